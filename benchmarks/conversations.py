"""
Conversations: tokens of one row with all its answers, compared with one row per answer.

    python -m benchmarks.conversations                    # generated turns, 2 to 16 answers per conversation
    python -m benchmarks.conversations --turns 4 --rows 100 --words 120

A row with all its answers computes its history once. Templates that strip the thinking of earlier turns (Qwen 3's) make it a tree;
with others it is one causal run. One row per answer is what a trainer needs that has one output per row, to train every answer as
inference sees it. The last column is the share of labelled tokens that is left if only the last answer of a row is trained.
"""

import argparse
import os
import random
import tempfile
from importlib.resources import files

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from benchmarks.common.measure import machine, print_table
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.sources.synthetic import build_model, build_tokenizer, synthetic_rows

TEMPLATES = ("qwen2_5", "qwen3")


def conversations(turns: int, rows: int, words: int, vocabulary: list[str]) -> list[dict]:
    """Conversations whose requests have a third of `words` words, thinking `words` and answers `words`."""
    rng = random.Random(turns)

    def said(count: int) -> str:
        return " ".join(rng.choices(vocabulary, k=count))

    made = []
    for _ in range(rows):
        messages = []
        for _ in range(turns):
            messages.append({"role": "user", "content": said(max(words // 3, 1))})
            messages.append({"role": "assistant", "content": f"<think>\n{said(words)}\n</think>\n\n{said(words)}"})
        made.append({"messages": messages})
    return made


def one_row_per_answer(rows: list[dict]) -> list[dict]:
    """The same answers as rows whose last answer is trained."""
    return [
        {"messages": row["messages"][: i + 1]}
        for row in rows
        for i, message in enumerate(row["messages"])
        if message["role"] == "assistant"
    ]


def prepared(rows: list[dict], tokenizer: PreTrainedTokenizerBase, **options) -> Dataset:
    with tempfile.TemporaryDirectory() as folder:
        args = MISOSFTConfig(
            folder, report_to="none", use_cpu=True, bf16=False, max_length=None, chunk_probs=[1.0], **options
        )
        dataset = Dataset.from_list(rows)
        trainer = MISOSFTTrainer(build_model(tokenizer), args, train_dataset=dataset, processing_class=tokenizer)
        return trainer.train_dataset


def tokens(dataset: Dataset) -> int:
    return sum(map(len, dataset["input_ids"]))


def labels(dataset: Dataset) -> int:
    return sum(label != -100 for row in dataset["labels"] for label in row)


def compare(turns: int, rows: int, words: int) -> list[list[str]]:
    raw = synthetic_rows(300)
    vocabulary = sorted({word for row in raw for m in row["messages"] for word in m["content"].split()})
    lines = []
    for name in TEMPLATES:
        tokenizer = build_tokenizer(raw, vocab_size=4000)
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = files("trl").joinpath("chat_templates", f"{name}.jinja").read_text()
        whole = conversations(turns, rows, words, vocabulary)
        every, last = prepared(whole, tokenizer), prepared(whole, tokenizer, train_turns="last")
        split = prepared(one_row_per_answer(whole), tokenizer, train_turns="last")
        if labels(every) != labels(split):
            raise AssertionError("all answers of a row have other labels than one row per answer")
        figures = f"{tokens(every):,}", f"{tokens(split):,}", f"{tokens(split) / tokens(every):.2f}"
        lines.append([name, f"{turns}", *figures, f"{labels(last) / labels(every):.0%}"])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 4, 8, 16], help="answers per conversation")
    parser.add_argument("--rows", type=int, default=50, help="conversations")
    parser.add_argument("--words", type=int, default=100, help="words of an answer, and of its thinking")
    options = parser.parse_args()
    lines = []
    for turns in options.turns:
        lines += compare(turns, options.rows, options.words)
    header = ["template", "answers", "tokens", "one row per answer", "ratio", "labels of the last answers"]
    print(machine("cpu"))
    print_table(f"{options.rows} conversations, answers and thinking of {options.words} words each", header, lines)


if __name__ == "__main__":
    main()
