"""
One optimizer step of MISO, plain SFT and other ways to train on several contexts, on the same rows.

    python -m benchmarks.step --quick                                  # generated rows, under 3 minutes on 2 cores
    python -m benchmarks.step --prose rows.jsonl --json FILE           # real text: prompt, constraints, completion
    python -m benchmarks.step --prose rows.jsonl --device cuda --size 1b

Every variant is a trainer that takes one step over the same rows, in however many batches: data loading, collation, forward,
backward and optimizer, under TRL's default settings, which include activation checkpointing. Times are medians of steps that
alternate between the variants. SFTTrainer runs both with packing and row by row: on a CPU packing needs a dense mask (sdpa),
so row by row is faster there.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
import transformers
from datasets import Dataset
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.measure import ceiling, machine, median, peak_memory, print_table, write_json
from benchmarks.common.rows import adapt, crab_shaped_rows, full_prompts, long_rows, texts
from benchmarks.variants import VARIANTS, StepTimer, batch_work, build
from trl_miso.preview.statistics import ModelShape
from trl_miso.recipes import SHIPPED
from trl_miso.sources.synthetic import build_tokenizer

TEMPLATE = SHIPPED["chat template"]["tulu"]
SFT = ("SFTTrainer, packed", "SFTTrainer, row by row")
CRAB = [name for name in VARIANTS if "succ" not in name]
QUICK = {"none": (*SFT, "MISO single", "MISO para", "one row per context"), "half": (*SFT, "MISO single", "MISO para")}
MEMORY_OF = (*SFT, "MISO single", "MISO para")  # variants whose peak memory is measured
WORKLOADS = ("none", "half", "2048", "8192", "16384")  # share of rows with demonstrations, or tokens of a long input
OUTPUT = 512  # tokens of a long row's output
# hidden size, intermediate size, layers, heads, key-value heads
SIZES = {"tiny": (512, 1536, 2, 8, 2), "small": (512, 1536, 4, 8, 2), "1b": (2048, 8192, 16, 32, 8)}


def make_model(size: str, tokenizer: Any, device: str) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, groups = SIZES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16" if device == "cuda" else "float32",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class Workload:
    """The rows of a workload in the formats of all variants, and their tokenizer."""

    def __init__(self, kind: str, options: argparse.Namespace):
        material = texts(options.prose)
        self.tokenizer = build_tokenizer(crab_shaped_rows(500, material), vocab_size=16000)
        self.tokenizer.chat_template = TEMPLATE.read_text()
        self.device, self.size, self.max_length = options.device, options.size, 2048
        text = "generated text" if options.prose is None else "real text"
        if kind.isdigit():
            count = max(1, options.rows * 1024 // int(kind))
            self.title = f"{count} rows of {text} with an input of {kind} tokens and an output of {OUTPUT}"
            self.max_length = int(kind) + 2 * OUTPUT
            rows = long_rows(count, material, self.tokenizer, int(kind), OUTPUT)
            self.miso = self.sft = Dataset.from_list(rows)
            return
        self.title = f"{options.rows} Crab-shaped rows of {text}, demonstrations in {kind} of them"
        raw = crab_shaped_rows(options.rows, material, 1, demonstrations=kind == "half")
        rows = Dataset.from_list(raw)
        self.miso = adapt(rows)
        self.sft = full_prompts(self.miso)

    def trainer(self, name: str, folder: str) -> Any:
        model = make_model(self.size, self.tokenizer, self.device)
        rows, max_length = (self.sft if VARIANTS[name].plain else self.miso), self.max_length
        return build(name, model, rows, self.tokenizer, folder, self.device, max_length)


def measure(workload: Workload, names: list[str], repeats: int, folder: str) -> dict[str, dict[str, float]]:
    """Figures per variant: seconds, tokens, score pairs, batches, loss of the first step.

    Also the shares of a step's time outside the model, and in logging shares of attention.
    """
    trainers = {name: workload.trainer(name, folder) for name in names}
    timers = {name: StepTimer(trainer, VARIANTS[name], workload.device) for name, trainer in trainers.items()}
    figures: dict[str, dict[str, Any]] = {name: {"seconds": [], "outside": [], "shares": []} for name in names}
    for name, trainer in trainers.items():
        tokens, pairs = zip(*map(batch_work, trainer.get_train_dataloader()), strict=True)
        timers[name].step()  # warms up
        loss = trainer.state.log_history[0]["loss"]
        figures[name] |= {"tokens": sum(tokens), "pairs": sum(pairs), "batches": len(tokens), "loss": loss}
    for _ in track(range(repeats), f"{workload.title}: steps", transient=True):
        for name, timer in timers.items():
            timer.step()
            figures[name]["seconds"].append(timer.seconds)
            if not timer.by_part:  # take the parts from a step of their own, since measuring them slows a step down
                timer.by_part = True
                timer.step()
                timer.by_part = False
            figures[name]["outside"].append(timer.outside / timer.seconds)
            figures[name]["shares"].append(timer.shares / timer.seconds)
    medians = ("seconds", "outside", "shares")
    return {name: f | {key: median(f[key]) for key in medians} for name, f in figures.items()}


def memory(kind: str, name: str, options: argparse.Namespace) -> float:
    """Peak memory of a step above what was in use before it, in MB, from a separate process; nan where it cannot be measured."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.step",
        "--child",
        kind,
        name,
        "--size",
        options.size,
        "--device",
        options.device,
    ]
    command += ["--rows", str(options.rows), *(["--prose", str(options.prose)] if options.prose else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1]) / 1e6


def child(kind: str, name: str, options: argparse.Namespace, folder: str) -> None:
    workload = Workload(kind, options)
    timer = StepTimer(workload.trainer(name, folder), VARIANTS[name], options.device)
    timer.step()  # allocates the optimizer's states
    print(peak_memory(timer.step, options.device) or "nan")


def report(workload: Workload, figures: dict[str, dict[str, Any]], top: float) -> None:
    """Print one row per variant. FLOP/s counts the products that a step needs; recomputed ones do not count."""
    shape = ModelShape.of(make_model(workload.size, workload.tokenizer, "cpu").config, workload.size)
    packed = figures.get(SFT[0])
    fastest = min((figures[name] for name in SFT if name in figures), key=lambda f: f["seconds"])
    rows = []
    for name, f in figures.items():
        rate = 3 * shape.flops(f["tokens"], f["pairs"]) / f["seconds"]
        over = [f"{f['seconds'] / base['seconds']:.2f}" if base else "" for base in (packed, fastest)]
        peak = f"{f['memory']:,.0f}" if "memory" in f else ""
        work = [
            f"{f['tokens']:,}",
            f"{f['pairs'] / 1e6:.2f}",
            str(f["batches"]),
            f"{rate / 1e9:,.0f}",
            f"{rate / top:.0%}",
        ]
        rows.append([name, f"{f['seconds']:.2f}", *over, *work, peak, f"{f['outside']:.1%}", f"{f['loss']:.4f}"])
    columns = ["", "s/step", "/ packed", "/ fastest", "tokens", "M pairs", "batches", "GFLOP/s", "of top", "peak MB"]
    print_table(workload.title, [*columns, "outside", "loss"], rows)


def ratios(figures: dict[str, dict[str, dict[str, Any]]]) -> dict[str, float]:
    """The ratios that changes are judged by, from the figures per workload and variant."""

    def ratio(kind: str, name: str, *others: str, key: str = "seconds") -> float | None:
        values = {variant: f[key] for variant, f in figures.get(kind, {}).items() if key in f}
        bases = [values[other] for other in others if other in values]
        return values[name] / min(bases) if bases and name in values else None

    para, rows, packed = "MISO para", "one row per context", SFT[0]
    values = {
        "para_shared_over_sft": ratio("none", para, packed),
        "para_shared_demos_over_sft": ratio("half", para, packed),
        "para_shared_over_fastest_sft": ratio("none", para, *SFT),
        "para_shared_demos_over_fastest_sft": ratio("half", para, *SFT),
        "rows_over_para_shared": ratio("none", rows, para),
        "rows_over_para_shared_demos": ratio("half", rows, para),
        "single_over_sft": ratio("none", "MISO single", packed),
        "single_over_fastest_sft": ratio("none", "MISO single", *SFT),
        "peak_memory_para_over_sft": ratio("none", para, packed, key="memory"),
        "outside_model_share": figures["none"][para]["outside"] if "none" in figures else None,
        "log_shares_share": figures["none"][para]["shares"] if "none" in figures else None,
    }
    for kind in filter(str.isdigit, figures):
        for k in (1, 2, 4, 8):
            values[f"succ{k}_over_sft_{int(kind) // 1024}k"] = ratio(kind, f"MISO succ, k = {k}", *SFT)
    return {key: round(value, 4) for key, value in values.items() if value is not None}


def run(options: argparse.Namespace, folder: str) -> None:
    print(machine(options.device))
    top = ceiling(options.device, torch.bfloat16 if options.device == "cuda" else torch.float32)
    print(f"matrix product: {top / 1e9:,.0f} GFLOP/s; model: {options.size} {SIZES[options.size]}\n")
    figures = {}
    for kind in options.workloads:
        workload = Workload(kind, options)
        names = [SFT[1], *(f"MISO succ, k = {k}" for k in (1, 2, 4, 8))] if kind.isdigit() else CRAB
        if options.quick:
            names = [name for name in names if name in QUICK.get(kind, names)]
        figures[kind] = measure(workload, names, options.repeats, folder)
        if not (options.quick and kind == "half"):
            for name in MEMORY_OF:
                if name in names:
                    figures[kind][name]["memory"] = memory(kind, name, options)
        report(workload, figures[kind], top)
    summary = ratios(figures)
    print_table("ratios", ["", ""], [[name, f"{value:.3f}"] for name, value in summary.items()])
    write_json(options.json, summary | {"variants": figures})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, help="size of the random Llama (default: small, tiny with --quick)")
    parser.add_argument(
        "--prose", type=Path, help=".jsonl rows of prompt, constraints, completion (default: generated)"
    )
    parser.add_argument("--rows", type=int, help="rows per step (default: 8, 4 with --quick)")
    parser.add_argument("--repeats", type=int, help="measured steps per variant (default: 3, 2 with --quick)")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="default: all, the first two with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer rows, variants and workloads")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rows = options.rows or (4 if options.quick else 8)
    options.repeats = options.repeats or (2 if options.quick else 3)
    options.size = options.size or ("tiny" if options.quick else "small")
    options.workloads = options.workloads or (WORKLOADS[:2] if options.quick else WORKLOADS)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        if options.child:
            child(*options.child, options, folder)
        else:
            run(options, folder)


if __name__ == "__main__":
    main()
