"""
Retrieval-augmented answers: each retrieved passage is a context of its own, weighted by its score.

BM25 retrieves the passages of each question. A model is trained on questions with their passages. Held-out questions are answered in
two ways: by standard inference, one prompt with all passages, and from one context per passage. Without `--model` a tiny random model
writes gibberish from the passages in examples/rag/, on a CPU in a minute: a check that everything runs. On data of your own:

    pip install 'trl-miso[rag]'
    python examples/rag.py --corpus passages.jsonl --questions questions.jsonl --model Qwen/Qwen3-0.6B --learning_rate 1e-5

Passages have a column `text`. Questions have `question` and `answers`, a list of which the first is trained. The other
options are those of `trl-miso sft`. The rows are written to OUTPUT_DIR.jsonl: see them with `trl-miso preview`. docs/rag.md has more.
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_miso import miso_generate
from trl_miso.cli.main import run
from trl_miso.cli.parser import count_from
from trl_miso.recipe import RecipeArguments, load_rows
from trl_miso.segments.packed import WEIGHTINGS

try:
    import bm25s
except ImportError as error:
    raise SystemExit(
        "rag.py: Got no package bm25s, expected it to retrieve. Fix: pip install 'trl-miso[rag]'."
    ) from error

SHIPPED = Path(__file__).parent / "rag"
Messages = list[dict[str, str]]


def parse_arguments(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """The options of this script, and those of `trl-miso sft`."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("--corpus", default=SHIPPED / "corpus.jsonl")
    parser.add_argument("--questions", default=SHIPPED / "questions.jsonl")
    parser.add_argument("--model", "--model_name_or_path", help="a chat model (default: a tiny random one)")
    parser.add_argument("--output_dir", default="rag-miso")
    parser.add_argument("--top_k", type=count_from(1), default=4, help="passages per question")
    parser.add_argument("--held_out", type=count_from(1), default=20, help="last questions, answered and not trained")
    parser.add_argument("--max_new_tokens", type=count_from(1), default=16)
    parser.add_argument("--context_weighting", default="scores", choices=["scores", *WEIGHTINGS])
    return parser.parse_known_args(arguments)


def read(file: str | Path, columns: dict[str, type]) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .json, .csv or .parquet file. Raises ValueError if a column is missing or empty in one."""
    rows = load_rows(RecipeArguments(dataset_name=str(file)), "train").to_list()
    for i, row in enumerate(rows):
        for column, kind in columns.items():
            if not isinstance(row.get(column), kind) or not row[column]:
                expected = f"expected a {kind.__name__} with content. Fix: correct column {column!r}."
                raise ValueError(f"Got {row.get(column)!r:.100} in column {column!r}, row {i} of {file}, {expected}")
    return rows


def retrieve(passages: list[str], questions: list[str], k: int) -> list[tuple[list[str], list[float]]]:
    """The k best passages of each question, best first, with their weights: the softmax of their BM25 scores.

    BM25 estimates the log odds that a passage is relevant. So its softmax estimates the probability that this passage, of the k, is.
    """
    index = bm25s.BM25()
    index.index(bm25s.tokenize(passages, show_progress=False), show_progress=False)
    places, scores = index.retrieve(bm25s.tokenize(questions, show_progress=False), k=k, show_progress=False)
    weights = torch.from_numpy(scores).double().softmax(1).tolist()
    return [([passages[i] for i in best], row) for best, row in zip(places, weights, strict=True)]


def prompt(question: str, passages: list[str]) -> Messages:
    """A user's turn. The question comes first: the contexts of a row then share it as a prefix, which is computed once."""
    request = "Answer the question from what follows, in as few words as you can."
    parts = [request, f"Question: {question}", *(f"Passage: {passage}" for passage in passages)]
    return [{"role": "user", "content": "\n\n".join(parts)}]


def make_row(question: dict[str, Any], passages: list[str], weights: list[float]) -> dict[str, Any]:
    """The columns that MISO trains on (docs/data.md). `prompt`, of standard inference, is not among the contexts."""
    return {
        "contexts": [prompt(question["question"], [passage]) for passage in passages],
        "context_weights": weights,
        "prompt": prompt(question["question"], passages),
        "completion": [{"role": "assistant", "content": question["answers"][0]}],
    }


def answer(name: str, rows: list[dict[str, Any]], weighting: str, max_new_tokens: int) -> list[tuple[str, str]]:
    """The greedy answers of a model to each row: by standard inference, which is generation from one context, and from all."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).to(torch.accelerator.current_accelerator() or "cpu")

    def write(contexts: list[Messages], **mixture: Any) -> str:
        out = miso_generate(model, tokenizer, contexts, max_new_tokens=max_new_tokens, do_sample=False, **mixture)
        return tokenizer.decode(out[0], skip_special_tokens=True).strip()

    answers = []
    for row in rows:
        mixture = {"weights": row["context_weights"]} if weighting == "scores" else {"weighting": weighting}
        answers.append((write([row["prompt"]]), write(row["contexts"], **mixture)))
    return answers


def holds(text: str, question: dict[str, Any]) -> bool:
    return any(reference.lower() in text.lower() for reference in question["answers"])


def main() -> None:
    args, options = parse_arguments(sys.argv[1:])
    passages = [row["text"] for row in read(args.corpus, {"text": str})]
    questions = read(args.questions, {"question": str, "answers": list})
    retrieved = retrieve(passages, [question["question"] for question in questions], args.top_k)
    rows = [make_row(question, *best) for question, best in zip(questions, retrieved, strict=True)]
    for k in range(1, args.top_k + 1):
        found = [holds("\n".join(texts[:k]), q) for q, (texts, _) in zip(questions, retrieved, strict=True)]
        print(f"recall@{k}: {sum(found) / len(found):.2f}")
    # An answer that no passage holds would teach the model to guess.
    train = [rows[i] for i in range(len(rows) - args.held_out) if found[i]]
    print(f"{len(train)} questions are trained, {args.held_out} held out. The passages of the others hold no answer.")

    options = [*(("--model", args.model) if args.model else ("--config", str(SHIPPED / "tiny.yaml"))), *options]
    if args.context_weighting != "scores":
        options += ["--context_weighting", args.context_weighting]
        for row in train:
            del row["context_weights"]
    file = f"{args.output_dir}.jsonl"
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in train), encoding="utf-8")
    run("sft", [file, "--output_dir", args.output_dir, *options])
    if "--dry_run" in options:
        return

    held_out = questions[-args.held_out :]
    print("\nHeld-out answers that hold a reference: standard inference, MISO")
    for name in filter(None, (args.model, args.output_dir)):
        answers = answer(name, rows[-args.held_out :], args.context_weighting, args.max_new_tokens)
        hits = [sum(map(holds, texts, held_out)) for texts in zip(*answers, strict=True)]
        print(f"  {name}: {hits[0]}, {hits[1]} of {len(held_out)}")
    print(f"\n{held_out[-1]['question']} {held_out[-1]['answers']}")
    for text, weight in zip(*retrieved[-1], strict=True):
        print(f"  {weight:.3f}  {text[:100]!r} ...")
    print(f"standard inference: {answers[-1][0]!r}\nMISO: {answers[-1][1]!r}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # such as a mistyped model
        raise SystemExit(f"rag.py: {str(error).splitlines()[0]}") from error
