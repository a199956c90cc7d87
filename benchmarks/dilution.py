"""
Dilution: how much attention is left to the output as contexts are added (paper, section 4.3), and what the model writes then.

    python -m benchmarks.dilution --figure FILE.png --markdown FILE      # SmolLM2 and Gemma 3; 3 minutes of one idle core
    python -m benchmarks.dilution --prompts 12                           # the second table too
    python -m benchmarks.dilution --models FOLDER --quick --device cuda  # any checkpoint

The rows are requests in real English, written for this project; each context is the request with one constraint. First table: the
output's share of the attention of a given answer, mean over layers, heads, answer tokens and rows, under each weighting, and by eq. 6
from the masses in the uniform mixture of all contexts. Second table, with `--prompts`: perplexity, under the plain model after the prompt with all n
constraints, of greedy text written under each weighting, and of that prompt's own greedy text ("standard"); in brackets the share of
4-grams that the text had before.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common.measure import machine, print_table, write_json
from benchmarks.common.real_models import MODELS, real_model
from benchmarks.common.requests import RESPONSE_TEMPLATE, one_constraint_contexts
from trl_miso.data.options import DataOptions
from trl_miso.evaluation.greedy import greedy_responses
from trl_miso.generation import miso_generate
from trl_miso.report.dilution import WEIGHTINGS
from trl_miso.report.measure import measure
from trl_miso.report.samples import Sample, Sampler

CONTEXTS = (1, 2, 4, 8)
TITLES = {"smollm2": "SmolLM2 135M Instruct", "gemma3": "Gemma 3 270M"}
STYLES = {"uniform": "o-", "fid": "s-", "vanilla": "^-", "equation 6": "k--"}


def samples_of(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[Sample]:
    """The first rows of `benchmarks/common/requests.py` with eight contexts, as the report measures rows."""
    chat = tokenizer.chat_template is not None
    sampler = Sampler(tokenizer, DataOptions(response_template=None if chat else RESPONSE_TEMPLATE), "contexts")
    return [sampler(row, i) for i, row in enumerate(one_constraint_contexts(chat=chat)[:rows])]


def output_shares(model: PreTrainedModel, samples: list[Sample]) -> list[dict[int, dict[str, float]]]:
    """For each sample, by number of contexts: the output's share under each weighting, and by eq. 6."""
    longest = max(sample.longest for sample in samples)
    return [measurement.dilution for measurement in measure(model, samples, max_length=longest)]


def written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: int, contexts: int, tokens: int
) -> dict[str, tuple[float, float]]:
    """Perplexity and repetition of greedy text, by standard inference and under each weighting."""
    chat = tokenizer.chat_template is not None
    requests = one_constraint_contexts(contexts, chat)[:prompts]
    ids = []
    for row in requests:
        if chat:
            ids.append(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        else:
            ids.append(tokenizer(row["prompt"])["input_ids"])
    end = model.generation_config.eos_token_id

    def judged(answers: list[list[int]]) -> tuple[float, float]:
        answers = [_until_end(answer, end) for answer in answers]
        pairs = zip(ids, answers, strict=True)
        losses = np.concatenate([token_losses(model, prompt, answer) for prompt, answer in pairs])
        return float(np.exp(losses.mean())), repetition(answers)

    standard = judged(greedy_responses(model, tokenizer, ids, tokens))
    found = dict.fromkeys(("standard", *WEIGHTINGS), standard)
    if contexts == 1:  # generation from one context is standard inference
        return found
    for weighting in WEIGHTINGS:
        out = miso_generate(
            model,
            tokenizer,
            [row["contexts"] for row in requests],
            weighting=weighting,
            response_template=None if chat else RESPONSE_TEMPLATE,
            max_new_tokens=tokens,
            do_sample=False,
        )
        found[weighting] = judged(out.tolist())
    return found


def _until_end(answer: list[int], eos: int | list[int] | None) -> list[int]:
    """The answer up to its first end token, without the padding that follows."""
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    length = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
    return answer[:length]


@torch.no_grad()
def token_losses(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Negative log-likelihood of each token of an answer under the plain model."""
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
    targets = ids[0, len(prompt) :]
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu().numpy()


def repetition(answers: list[list[int]], n: int = 4) -> float:
    """Share of n-grams that stand in the same answer before."""
    total, distinct = 0, 0
    for answer in answers:
        grams = [tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)]
        total, distinct = total + len(grams), distinct + len(set(grams))
    return 1 - distinct / total if total else math.nan


def mean_shares(shares: list[dict[int, dict[str, float]]]) -> dict[int, dict[str, float]]:
    return {
        n: {name: float(np.mean([row[n][name] for row in shares])) for name in (*WEIGHTINGS, "equation 6")}
        for n in CONTEXTS
    }


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and lines of each table."""
    shares, texts = [], []
    for name, model in figures.items():
        title = TITLES.get(name, Path(name).name)
        for n in CONTEXTS:
            line = model["mean"][n]
            shares.append([title, str(n), *(f"{line[key]:.1%}" for key in (*WEIGHTINGS, "equation 6"))])
            if model["written"]:
                cells = [f"{perplexity:.1f} ({again:.0%})" for perplexity, again in model["written"][n].values()]
                texts.append([title, str(n), *cells])
    found = [("the output's share of attention", ["model", "contexts", *WEIGHTINGS, "eq. 6"], shares)]
    if texts:
        title = "perplexity of greedy text (repeated 4-grams)"
        found.append((title, ["model", "contexts", "standard", *WEIGHTINGS], texts))
    return found


def as_markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def draw(figures: dict[str, Any], file: Path) -> None:
    """Draw the output's share by number of contexts, a panel per model; the shaded range is that of the rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(figures), 3.4), layout="constrained")
    top = 1.08 * max(
        line[key] for model in figures.values() for row in model["rows"] for line in row.values() for key in line
    )
    axes = figure.subplots(1, len(figures), sharey=True, squeeze=False)[0]
    for axis, (name, model) in zip(axes, figures.items(), strict=True):
        for key, style in STYLES.items():
            values = [model["mean"][n][key] for n in CONTEXTS]
            (line,) = axis.plot(CONTEXTS, values, style, label="eq. 6" if key == "equation 6" else key)
            if key != "equation 6":
                by_row = np.array([[row[n][key] for n in CONTEXTS] for row in model["rows"]])
                axis.fill_between(
                    CONTEXTS, by_row.min(0), by_row.max(0), color=line.get_color(), alpha=0.12, linewidth=0
                )
        axis.set(title=TITLES.get(name, Path(name).name), xlabel="contexts", xscale="log", ylim=(0, top))
        axis.set_xticks(CONTEXTS, map(str, CONTEXTS))
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("the output's share of attention")
    axes[-1].legend(frameon=False)
    figure.savefig(file, dpi=150, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(TITLES),
        help="smollm2, gemma3 (from pip packages), or folders of checkpoints",
    )
    parser.add_argument("--rows", type=int, default=4, help="rows of the first table, at most 12")
    parser.add_argument("--prompts", type=int, default=0, help="prompts of the second table, at most 12; 0: none")
    parser.add_argument("--tokens", type=int, default=24, help="length of the greedy texts")
    parser.add_argument("--quick", action="store_true", help="one row, one prompt, 4 tokens")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, prompts, tokens = (1, 1, 4) if options.quick else (options.rows, options.prompts, options.tokens)
    figures = {}
    for name in options.models:
        folder = real_model(name) if name in MODELS else Path(name)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(options.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        shares = output_shares(model, samples_of(tokenizer, rows))
        texts = {n: written(model, tokenizer, prompts, n, tokens) for n in CONTEXTS if prompts}
        figures[name] = {"mean": mean_shares(shares), "rows": shares, "written": texts}
    print(machine(options.device))
    print(f"{rows} rows" + f"; {prompts} prompts, greedy texts of {tokens} tokens" * bool(prompts))
    for title, header, lines in tables(figures):
        print_table(title, header, lines)
    if options.markdown:
        options.markdown.write_text("\n".join(as_markdown(header, lines) for _, header, lines in tables(figures)))
    if options.figure:
        draw(figures, options.figure)
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
