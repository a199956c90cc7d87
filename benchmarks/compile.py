"""
torch.compile: graph breaks, compiled frames and step times of MISO and of SFTTrainer, on the same rows.

    python -m benchmarks.compile --quick                       # the tiny model, few steps
    python -m benchmarks.compile --markdown FILE
    python -m benchmarks.compile --device cuda --size 1b

Every variant trains over the same batches twice, compiled and not, packed, and with TRL's default settings, which include
activation checkpointing. Breaks and frames are torch's own counts of the compiled run: frames are the pieces of code that were
compiled, once more where a batch did not fit what was compiled before. "First" is the time of the first steps, in which
compilation happens; the others give the median step. "Loss" is the largest difference of a step's loss, compiled or not,
relative to the loss.
"""

import argparse
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # or a second run would compile nothing

import datasets
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.common.measure import machine, median, print_table, synchronize, write_json
from benchmarks.common.tables import markdown
from benchmarks.step import SIZES, Workload, make_model
from trl_miso import MISOSFTConfig, MISOSFTTrainer

VARIANTS = {
    "SFTTrainer": {},
    "MISO single": {"context_mode": "single"},
    "MISO para": {"context_mode": "para"},
    "MISO succ": {"context_mode": "succ", "chunk_probs": [0.0, 0.0, 0.0, 1.0]},
}
WARM = 3  # steps whose time is that of compilation: the first two shapes, and the first batch of MISO, which is not compiled
COLUMNS = ["", "breaks", "frames", "first, s", "s/step", "/ SFT", "s/step, not compiled", "compiled / not", "loss"]


class Run(NamedTuple):
    seconds: list[float]  # of each step
    losses: list[float]
    breaks: int
    frames: int
    reasons: dict[str, int]  # of the breaks


class StepClock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self, device: str):
        self.device, self.seconds, self._started = device, [], 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self._started)


def train(name: str, compiled: bool, workload: Workload, options: argparse.Namespace, folder: str) -> Run:
    """Train a new model for `options.steps` steps."""
    torch.compiler.reset()
    counters.clear()
    plain = name == "SFTTrainer"
    settings = {
        "output_dir": folder,
        "max_steps": options.steps,
        "per_device_train_batch_size": 1,
        "packing": True,
        "max_length": options.max_length,
        "learning_rate": 1e-5,
        "bf16": options.device == "cuda",
        "use_cpu": options.device == "cpu",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if compiled:
        settings |= {"torch_compile": True, "torch_compile_backend": options.backend}
    if not plain:
        settings["verify"] = False  # checks before the first step are not part of a step
    config, kind = (SFTConfig, SFTTrainer) if plain else (MISOSFTConfig, MISOSFTTrainer)
    trainer = kind(
        make_model(options.size, workload.tokenizer, options.device),
        config(**settings | VARIANTS[name]),
        train_dataset=workload.sft if plain else workload.miso,
        processing_class=workload.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    clock = StepClock(options.device)
    trainer.add_callback(clock)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    reasons = dict(counters["graph_break"])
    return Run(clock.seconds, losses, sum(reasons.values()), counters["frames"]["ok"], reasons)


def line(name: str, eager: Run, compiled: Run, sft: float) -> list[str]:
    """A row of the table. `sft` is SFTTrainer's compiled step, in seconds."""
    first, step = sum(compiled.seconds[:WARM]), median(compiled.seconds[WARM:])
    plain = median(eager.seconds[WARM:])
    loss = max(abs(a - b) / abs(a) for a, b in zip(eager.losses, compiled.losses, strict=True))
    counts = [str(compiled.breaks), str(compiled.frames)]
    times = [f"{first:.1f}", f"{step:.3f}", f"{step / sft:.2f}", f"{plain:.3f}", f"{step / plain:.2f}"]
    return [name, *counts, *times, f"{loss:.1e}"]


def run(options: argparse.Namespace, folder: str) -> None:
    print(machine(options.device))
    workload = Workload("none", options)
    title = f"{options.steps} steps, bins of {options.max_length} tokens, {options.size} {SIZES[options.size]}, {options.backend}"
    rows, figures, sft = [], {}, 0.0
    for name in ["SFTTrainer", *options.variants]:
        eager = train(name, False, workload, options, folder)
        compiled = train(name, True, workload, options, folder)
        sft = sft or median(compiled.seconds[WARM:])
        rows.append(line(name, eager, compiled, sft))
        print("; ".join(f"{column} {cell}" for column, cell in zip(COLUMNS, rows[-1], strict=True)).strip(), flush=True)
        figures[name] = {"compiled": compiled._asdict(), "eager": eager._asdict()}
    print_table(title, COLUMNS, rows)
    for name, figure in figures.items():
        for reason, count in figure["compiled"]["reasons"].items():
            print(f"{name}: {count} x {reason.splitlines()[0]}")
    write_json(options.json, figures)
    if options.markdown:
        options.markdown.write_text(markdown([(title, COLUMNS, rows)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, help="size of the random Llama (default: small, tiny with --quick)")
    variants = [name for name in VARIANTS if name != "SFTTrainer"]
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants, help="beside SFTTrainer")
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile")
    parser.add_argument("--steps", type=int, help=f"more than {WARM} (default: 12, 6 with --quick)")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of a bin")
    parser.add_argument("--rows", type=int, default=64, help="rows of the data set")
    parser.add_argument(
        "--prose", type=Path, help=".jsonl rows of prompt, constraints, completion (default: generated)"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    options.steps = options.steps or (6 if options.quick else 12)
    options.size = options.size or ("tiny" if options.quick else "small")
    if options.steps <= WARM:
        parser.error(f"got --steps {options.steps}, expected more than {WARM}")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        run(options, folder)


if __name__ == "__main__":
    main()
