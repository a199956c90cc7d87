"""
Preparation of rows: rows per second on one core, compared with SFTTrainer's own preparation of the same rows; peak memory.

    python -m benchmarks.preparation                       # generated rows in Crab's schema
    python -m benchmarks.preparation --prose rows.jsonl    # real text: prompt, constraints, completion
    python -m benchmarks.preparation --memory 66500        # peak memory of preparing 66,500 rows, and a tenth of them

Every figure is the median of `--repeats` runs, which alternate between the trainers. Nothing is cached except in the line "cached".
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import transformers
import trl
from datasets import Dataset, load_dataset
from rich.console import Console
from trl import SFTConfig, SFTTrainer

from benchmarks.common.measure import median, print_table, timed
from benchmarks.common.rows import adapt, crab_shaped_rows, full_prompts, texts
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.recipes import SHIPPED
from trl_miso.sources.synthetic import build_model, build_tokenizer, synthetic_rows

TEMPLATE = SHIPPED["chat template"]["tulu"]


def make_rows(count: int, prose: Path | None) -> list[dict]:
    return synthetic_rows(count) if prose is None else crab_shaped_rows(count, texts(prose))


def make(trainer, config, dataset, tokenizer, **options):
    """Build a trainer, which prepares the dataset, and return its dataset. The model's share of the time is negligible."""
    common = {"report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 1, "max_length": 4096}
    with tempfile.TemporaryDirectory() as folder:
        args = config(folder, **common | options)
        return trainer(build_model(tokenizer), args, train_dataset=dataset, processing_class=tokenizer).train_dataset


def speed(count: int, prose: Path | None, repeats: int) -> None:
    raw = make_rows(count, prose)
    tokenizer = build_tokenizer(raw[:2000], vocab_size=16000)
    tokenizer.chat_template = TEMPLATE.read_text()
    rows = Dataset.from_list(raw)
    adapted = adapt(rows)
    plain = full_prompts(adapted)
    texts = [tokenizer.apply_chat_template(r["prompt"] + r["completion"], tokenize=False) for r in plain]
    miso = MISOSFTTrainer, MISOSFTConfig, adapted, tokenizer
    work = {
        "SFTTrainer, full prompt": lambda: make(SFTTrainer, SFTConfig, plain, tokenizer),
        "MISO para": lambda: make(*miso),
        "MISO succ": lambda: make(*miso, context_mode="succ"),
        "MISO single": lambda: make(*miso, context_mode="single"),
        "MISO para, streamed": lambda: list(
            make(MISOSFTTrainer, MISOSFTConfig, adapted.to_iterable_dataset(), tokenizer)
        ),
        "MISO para, 2 processes": lambda: make(*miso, dataset_num_proc=2),
        "Crab's adapter": lambda: adapt(rows),
        "tokenizer alone, each row once": lambda: tokenizer(texts, add_special_tokens=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, run in work.items():
            seconds[name].append(timed(run))
    datasets.enable_caching()
    on_disk = load_from_disk(adapted)
    make(MISOSFTTrainer, MISOSFTConfig, on_disk, tokenizer)
    seconds["MISO para, cached"] = [timed(lambda: make(MISOSFTTrainer, MISOSFTConfig, on_disk, tokenizer))]
    print_speed(seconds, count, tokenizer, texts)


def load_from_disk(dataset: Dataset) -> Dataset:
    folder = Path(tempfile.mkdtemp(dir=os.environ["HF_DATASETS_CACHE"]))
    dataset.save_to_disk(folder)
    return Dataset.load_from_disk(folder)


def print_speed(seconds: dict[str, list[float]], count: int, tokenizer, texts: list[str]) -> None:
    tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) / count
    sft = median(seconds["SFTTrainer, full prompt"])
    lines = []
    for name, times in seconds.items():
        middle = median(times)
        lines.append([name, f"{count / middle:,.0f}", f"{middle:.2f}", f"{middle / sft:.2f}"])
    title = f"{count} rows, {tokens:.0f} tokens per row"
    print_table(title, ["", "rows/s", "seconds", "time / SFTTrainer"], lines)


def memory(count: int, prose: Path | None) -> None:
    """Print the peak memory from a file to a prepared dataset, each number of rows in a separate process."""
    lines = []
    for rows in (count // 10, count):
        command = [
            sys.executable,
            "-m",
            "benchmarks.preparation",
            "--child",
            str(rows),
            *(["--prose", str(prose)] if prose else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        rate, before, peak = map(float, done.stdout.split()[-3:])
        lines.append([f"{rows:,}", f"{rate:,.0f}", f"{before:,.0f}", f"{peak:,.0f}", f"{peak - before:,.0f}"])
    columns = ["rows", "rows/s", "before, MB", "peak, MB", "growth, MB"]
    print_table("peak memory of preparation (para)", columns, lines)


def child(count: int, prose: Path | None) -> None:
    """Prepare rows of a file; print rows/s, and private memory before and at the peak in MB."""
    tokenizer = build_tokenizer(make_rows(2000, prose), vocab_size=16000)
    tokenizer.chat_template = TEMPLATE.read_text()
    file = Path(os.environ["HF_DATASETS_CACHE"]) / f"{count}.parquet"
    Dataset.from_generator(lambda: iter(make_rows(count, prose))).to_parquet(file)
    dataset = load_dataset("parquet", data_files={"train": str(file)}, split="train")
    before, peak, done = private_memory(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], private_memory())

    threading.Thread(target=watch, daemon=True).start()
    seconds = timed(lambda: make(MISOSFTTrainer, MISOSFTConfig, adapt(dataset), tokenizer))
    done.set()
    print(count / seconds, before, peak[0])


def private_memory() -> float:
    """Anonymous memory of this process in MB (Linux). Mapped Arrow files belong to the page cache and do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000, help="default: 3000")
    parser.add_argument(
        "--prose", type=Path, help=".jsonl rows of prompt, constraints, completion (default: generated)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument(
        "--memory", type=int, metavar="ROWS", help="measure the peak memory of preparing ROWS rows instead"
    )
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    # datasets has read the variable when it was imported: set it for child processes, and the value for this process.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HF_DATASETS_CACHE"] = cache
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        if options.child:
            child(options.child, options.prose)
            return
        versions = {module.__name__: module.__version__ for module in (trl, transformers, datasets)}
        Console().print(f"{versions}, {os.cpu_count()} cores", highlight=False)
        if options.memory:
            memory(options.memory, options.prose)
        else:
            speed(options.rows, options.prose, options.repeats)


if __name__ == "__main__":
    main()
