"""
The input pipeline, from raw rows to batches: rows per second of each stage, and the share of a step spent waiting for data.

    python -m benchmarks.input_pipeline                        # generated rows of Crab's shape
    python -m benchmarks.input_pipeline --prose rows.jsonl     # real text: prompt, constraints, completion

Each stage is timed separately, on one core; `preparation.py` compares preparation with SFTTrainer's. Waiting is the time that the
training loop takes to fetch the batches of a step, with the data loader in the training process and in workers. Balance is the
time that ranks wait for the slowest of them, one bin per rank in random order. It is counted in FLOP of a 7B Llama per bin, not
measured.
"""

import argparse
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import LlamaConfig

from benchmarks.common.measure import machine, median, print_table, timed
from benchmarks.common.rows import adapt, crab_shaped_rows, full_prompts, texts
from benchmarks.step import SIZES, TEMPLATE, make_model
from benchmarks.variants import VARIANTS, StepTimer, batch_work, build
from trl_miso.data.bins import pack_rows
from trl_miso.preview.statistics import ModelShape
from trl_miso.sources.synthetic import build_tokenizer

LENGTH = 4096


def stages(rows: Dataset, tokenizer, repeats: int, folder: str) -> list[list[str]]:
    """One line per stage: adapter, preparation and packing of rows in memory, collation of bins."""
    adapted = adapt(rows)
    model = make_model("tiny", tokenizer, "cpu")

    def make(name: str):
        return build(name, model, adapted, tokenizer, folder, "cpu", LENGTH)

    prepared, trainer = make("MISO para, row by row").train_dataset, make("MISO para")
    bins = list(trainer.train_dataset)
    tokens = sum(trainer.data_collator([members])["input_ids"].numel() for members in bins)
    work = {
        "Crab's adapter": lambda: adapt(rows),
        "preparation": lambda: make("MISO para, row by row"),
        "packing": lambda: pack_rows(prepared, LENGTH, True, None),
        "collation": lambda: [trainer.data_collator([members]) for members in bins],
    }
    lines = []
    for name, run in work.items():
        seconds = median([timed(run) for _ in range(repeats)])
        lines.append(
            [name, f"{len(rows) / seconds:,.0f}", f"{1e6 * seconds / len(rows):,.0f}", f"{tokens / seconds:,.0f}"]
        )
    return lines


def balance(rows: Dataset, tokenizer, ranks: int, folder: str) -> list[list[str]]:
    """The share of a step that the average rank waits for the slowest, for SFTTrainer's bins and for MISO's."""
    shape = ModelShape.of(LlamaConfig(), "7B")
    adapted = adapt(rows)
    lines = []
    for name, data in (("SFTTrainer, packed", full_prompts(adapted)), ("MISO para", adapted)):
        trainer = build(name, make_model("tiny", tokenizer, "cpu"), data, tokenizer, folder, "cpu", LENGTH)
        cost = np.array([shape.flops(*batch_work(batch)) for batch in trainer.get_train_dataloader()])
        steps = len(cost) // ranks
        waits = []
        for seed in range(100):
            drawn = np.random.default_rng(seed).permutation(cost)[: steps * ranks].reshape(steps, ranks)
            waits.append(1 - drawn.mean(1).sum() / drawn.max(1).sum())
        lines.append([name, str(len(cost)), f"{cost.std() / cost.mean():.1%}", f"{np.mean(waits):.1%}"])
    return lines


def waiting(rows: Dataset, tokenizer, size: str, workers: int, repeats: int, folder: str) -> list[str]:
    """Seconds of a step over the rows, and of these the seconds that the training loop waits for batches."""
    trainer = build("MISO para", make_model(size, tokenizer, "cpu"), adapt(rows), tokenizer, folder, "cpu", LENGTH)
    trainer.args.dataloader_num_workers = workers
    fetch, waited = trainer.get_batch_samples, []

    def timed_fetch(*args, **kwargs):
        start = time.perf_counter()
        batches = fetch(*args, **kwargs)
        waited.append(time.perf_counter() - start)
        return batches

    trainer.get_batch_samples = timed_fetch
    timer, steps = StepTimer(trainer, VARIANTS["MISO para"], "cpu"), []
    for _ in range(repeats + 1):
        timer.step()
        steps.append(timer.seconds)
    step, wait = median(steps[1:]), median(waited[1:])  # the first step warms up
    return [f"{workers} workers", f"{step:.2f}", f"{1000 * wait:.1f}", f"{wait / step:.2%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prose", type=Path, help=".jsonl rows of prompt, constraints, completion (default: generated)"
    )
    parser.add_argument("--rows", type=int, default=1000, help="rows that go through the stages (default: 1000)")
    parser.add_argument("--step_rows", type=int, default=16, help="rows per step (default: 16)")
    parser.add_argument("--ranks", type=int, default=8, help="ranks of the balance (default: 8)")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(machine("cpu"))
    material = texts(options.prose)
    raw = crab_shaped_rows(options.rows, material)
    tokenizer = build_tokenizer(raw, vocab_size=16000)
    tokenizer.chat_template = TEMPLATE.read_text()
    rows = Dataset.from_list(raw)
    with tempfile.TemporaryDirectory() as folder:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        lines = stages(rows, tokenizer, options.repeats, folder)
        print_table(f"{len(rows)} rows, one core", ["", "rows/s", "microseconds per row", "tokens/s"], lines)
        torch.set_num_threads(threads)
        few = rows.select(range(options.step_rows))
        lines = [waiting(few, tokenizer, options.size, workers, options.repeats, folder) for workers in (0, 2)]
        title = f"a step over {options.step_rows} rows, model {options.size} {SIZES[options.size]}"
        print_table(title, ["", "seconds per step", "waiting, milliseconds", "waiting, share"], lines)
        lines = balance(rows, tokenizer, options.ranks, folder)
        title = f"{options.ranks} ranks, bins of {LENGTH} tokens"
        print_table(title, ["", "bins", "deviation of their compute", "waiting for the slowest"], lines)


if __name__ == "__main__":
    main()
