"""
Generation from n contexts, compared with plain `generate` on one prompt of as many tokens.

    python -m benchmarks.decoding --quick                      # under a minute on 2 cores
    python -m benchmarks.decoding --json FILE
    python -m benchmarks.decoding --device cuda --size 1b

A prefix common to the contexts counts once in the prompt's tokens. Both decode greedily. "Prefill" is the forward over the
prompt, or over the contexts. "First token" is the time from the call to the first new token: prefill, and with MISO also
tokenization and a forward over the output's beginning (the response template), which costs as much as one more token. "Per
token" is the time between two new tokens. Figures are medians, also of the ratios; generations of the two variants alternate. A first generation
warms up, so the work that `miso_generate` does once per model is not counted.
"""

import argparse
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from rich.progress import track
from transformers.generation.streamers import BaseStreamer

from benchmarks.common.measure import machine, median, print_table, synchronize, write_json
from benchmarks.common.rows import crab_shaped_rows, texts
from benchmarks.step import SIZES, make_model
from trl_miso.generation import miso_generate
from trl_miso.segments import parallel
from trl_miso.sources.synthetic import build_tokenizer

HEAD = " Answer:"
MEASURED = ("prefill", "first", "token")


class Clock(BaseStreamer):
    """Streamer that records new tokens, the time of each, and the seconds of the model's first forward."""

    def __init__(self, model: Any, device: str):
        self.device, self.tokens, self.times, self.forwards = device, [], [], []
        self.hooks = model.register_forward_pre_hook(self._note), model.register_forward_hook(self._note)
        self.start = self._now()

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.tolist())
        self.times.append(self._now())

    def end(self) -> None:
        for hook in self.hooks:
            hook.remove()
        # times[0] belongs to the prompt, which `generate` puts before the first new token.
        self.prefill, self.first = self.forwards[1] - self.forwards[0], self.times[1] - self.start
        self.token = median([b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)])

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def _note(self, *_: Any) -> None:
        if len(self.forwards) < 2:
            self.forwards.append(self._now())


class Case:
    """`n` contexts of `shared` common tokens and about `extra` further ones each, and a plain prompt of as many distinct tokens."""

    def __init__(self, n: int, shared: int, extra: int, words: list[int], tokenizer: Any):
        prefix, rest = words[:shared], words[shared:]
        parts = [rest[i * extra : (i + 1) * extra] for i in range(n)]
        self.n, self.contexts = n, [tokenizer.decode(prefix + part) + HEAD for part in parts]
        self.head = tokenizer(HEAD)["input_ids"]
        ids = [tokenizer(context)["input_ids"][: -len(self.head)] for context in self.contexts]
        self.prompt = parallel(ids, 1, [1 / n] * n, "successive")[0]
        self.name = f"{n} x {extra}" + (f" after {shared}" if shared else "")


def generate(case: Case, miso: bool, model: Any, tokenizer: Any, new: int, device: str, with_head: bool) -> Clock:
    """Generate `new` tokens by `miso_generate` or by plain `generate`.

    `with_head` ends the plain prompt with the response template, as contexts end: with one context both then write the same.
    """
    clock = Clock(model, device)
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "streamer": clock}
    if miso:
        miso_generate(model, tokenizer, case.contexts, response_template=HEAD, **options)
    else:
        ids = torch.tensor([case.prompt + case.head if with_head else case.prompt], device=device)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return clock


def measure(cases: list[Case], model: Any, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of each case in seconds, and medians of the ratios of consecutive runs.

    Consecutive runs are compared because a busy machine slows them down alike.
    """
    clocks: dict[tuple[Case, bool], list[Clock]] = {(case, miso): [] for case in cases for miso in (False, True)}
    for repeat in track(range(options.repeats + 1), "Generating", transient=True):
        for (case, miso), runs in clocks.items():
            # The first run warms up; its tokens are reported, its times are not.
            runs.append(generate(case, miso, model, tokenizer, options.new, options.device, with_head=not repeat))
    rows = []
    for case in cases:
        plain, miso = clocks[case, False], clocks[case, True]
        row: dict[str, Any] = {"case": case.name, "n": case.n, "tokens": len(case.prompt)}
        for key in MEASURED:
            pairs = [(getattr(a, key), getattr(b, key)) for a, b in zip(plain[1:], miso[1:], strict=True)]
            row[f"{key}_plain"] = median([a for a, _ in pairs])
            row[f"{key}_miso"] = median([b for _, b in pairs])
            row[f"{key}_ratio"] = median([b / a for a, b in pairs])
        rows.append(row | {"new_plain": plain[0].tokens[1:], "new_miso": miso[0].tokens[1:]})
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    columns = ["", "tokens"]
    for name in ("prefill", "first token", "per token"):
        columns += [f"{name}, plain", "MISO", "ratio"]
    lines = []
    for row in rows:
        cells = [row["case"], f"{row['tokens']:,}"]
        for key in MEASURED:
            cells += [f"{1e3 * row[f'{key}_{name}']:,.1f}" for name in ("plain", "miso")]
            cells.append(f"{row[f'{key}_ratio']:.2f}")
        lines.append(cells)
    print_table("contexts x tokens, ms", columns, lines)


def run(options: argparse.Namespace) -> None:
    print(machine(options.device))
    print(f"model: {options.size} {SIZES[options.size]}, {options.new} new tokens, {options.repeats} repeats\n")
    material = texts()
    tokenizer = build_tokenizer(crab_shaped_rows(500, material), vocab_size=16000)
    model = make_model(options.size, tokenizer, options.device).to(options.device).eval()
    words = tokenizer(" ".join(text["completion"] for text in material))["input_ids"]
    counts, kinds = ((1, 4), ((0, 256),)) if options.quick else ((1, 2, 4, 8), ((0, 128), (0, 512), (512, 32)))
    cases = [Case(n, *kind, words, tokenizer) for kind in kinds for n in counts]
    rows = measure(cases, model, tokenizer, options)
    report(rows)
    write_json(options.json, {"cases": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--size", choices=SIZES, default="small", help="of a Llama with random weights (default: small)"
    )
    parser.add_argument("--new", type=int, default=48, help="tokens to generate (default: 48)")
    parser.add_argument("--repeats", type=int, help="default: 5, 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="two cases")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.repeats = options.repeats or (3 if options.quick else 5)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    run(options)


if __name__ == "__main__":
    main()
