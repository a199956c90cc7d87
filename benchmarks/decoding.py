"""
Generation from n contexts beside the plain model on one prompt of as many tokens as are read, common ones once.

    python -m benchmarks.decoding --quick                      # under a minute on 2 cores
    python -m benchmarks.decoding --json FILE
    python -m benchmarks.decoding --device cuda --size 1b

Both decode greedily. "Prefill" is the forward over the prompt, or over the contexts. "First token" is the time from the call to the
first new token: prefill, and with MISO tokenization and a forward of the output's beginning, which takes what one more token would.
"Per token" is the time between two new tokens. Medians, of the ratios too; generations of the variants alternate. The model was
generated from before: what `miso_generate` does once for a model is not counted.
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
    """New tokens, when each was there, and the seconds of the model's first forward."""

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
        # What is put first are the ids of the prompt.
        self.prefill, self.first = self.forwards[1] - self.forwards[0], self.times[1] - self.start
        self.token = median([b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)])

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def _note(self, *_: Any) -> None:
        if len(self.forwards) < 2:
            self.forwards.append(self._now())


class Case:
    """`n` contexts of about `own` tokens each after `shared` common ones, and a prompt of as many tokens as these are, each counted once."""

    def __init__(self, n: int, shared: int, own: int, words: list[int], tokenizer: Any):
        prefix, rest = words[:shared], words[shared:]
        parts = [rest[i * own : (i + 1) * own] for i in range(n)]
        self.n, self.contexts = n, [tokenizer.decode(prefix + part) + HEAD for part in parts]
        self.head = tokenizer(HEAD)["input_ids"]
        read = [tokenizer(context)["input_ids"][: -len(self.head)] for context in self.contexts]
        self.prompt = parallel(read, 1, [1 / n] * n, "successive")[0]
        self.name = f"{n} x {own}" + (f" after {shared}" if shared else "")


def generate(case: Case, miso: bool, model: Any, tokenizer: Any, new: int, device: str, whole: bool = False) -> Clock:
    """`whole`: the plain model's prompt ends as the contexts do, so that of one context both write the same."""
    clock = Clock(model, device)
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "streamer": clock}
    if miso:
        miso_generate(model, tokenizer, case.contexts, response_template=HEAD, **options)
    else:
        ids = torch.tensor([case.prompt + case.head if whole else case.prompt], device=device)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return clock


def measure(cases: list[Case], model: Any, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """For each case the medians of both, in seconds, and of the ratios of neighbours, which shared machines slow down alike."""
    found: dict[tuple[Case, bool], list[Clock]] = {(case, miso): [] for case in cases for miso in (False, True)}
    for repeat in track(range(options.repeats + 1), "Generating", transient=True):
        for (case, miso), clocks in found.items():
            # The first warms up, and is what was written.
            clocks.append(generate(case, miso, model, tokenizer, options.new, options.device, whole=not repeat))
    rows = []
    for case in cases:
        plain, miso = found[case, False], found[case, True]
        row: dict[str, Any] = {"case": case.name, "n": case.n, "tokens": len(case.prompt)}
        for key in MEASURED:
            pairs = [(getattr(a, key), getattr(b, key)) for a, b in zip(plain[1:], miso[1:], strict=True)]
            row[f"{key}_plain"], row[f"{key}_miso"] = (median([pair[side] for pair in pairs]) for side in (0, 1))
            row[f"{key}_ratio"] = median([b / a for a, b in pairs])
        rows.append(row | {"new_plain": plain[0].tokens[1:], "new_miso": miso[0].tokens[1:]})
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        times = [f"{1e3 * row[f'{key}_{name}']:,.1f}" for key in MEASURED for name in ("plain", "miso")]
        ratios = [f"{row[f'{key}_ratio']:.2f}" for key in MEASURED]
        pairs = zip(times[::2], times[1::2], ratios, strict=True)
        cells.append([row["case"], f"{row['tokens']:,}", *(cell for pair in pairs for cell in pair)])
    columns = [
        column for key in ("prefill", "first token", "per token") for column in (f"{key}, plain", "MISO", "ratio")
    ]
    print_table("contexts x tokens, ms", ["", "tokens", *columns], cells)


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
