"""
The paper's comparison of methods in miniature: which of them teaches a small model to satisfy several constraints?

    python -m benchmarks.miniature --quick --markdown FILE             # 4 minutes on 2 idle cores, 14 on busy ones
    python -m benchmarks.miniature --markdown FILE --figure FILE.png   # hours; resumes after it was killed
    python -m benchmarks.miniature --device cuda --size 30m --markdown FILE

A Llama is pretrained on a small language (`language.py`) whose constraints can be checked. Each method then fine-tunes it with
`MISOSFTTrainer`, and the result is tested by standard inference: one context, greedy. SFT is `context_mode="single"`, which takes
the same steps as TRL's SFTTrainer (`tests/benchmarks/test_benchmarks.py`). All methods see the same rows in the same order. The
learning rate of each method is chosen on a dev split; the test split is then examined once, with that rate. On a CPU the tables
are the same, bit for bit, in every run and with any number of processes. Seconds differ between runs, so they have tables of
their own.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.common.folders import exclusive_lock
from benchmarks.common.workers import start_worker
from benchmarks.miniature.run import estimate_seconds, run_study, write_report
from benchmarks.miniature.study import FULL, LARGE, MIXES, QUICK, SMOKE, Study

FOLDER = Path.home() / ".cache" / "trl-miso" / "miniature"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="smaller model, fewer rows, two seeds, two learning rates")
    scale.add_argument("--smoke", action="store_true", help="everything once, in seconds; its accuracies mean nothing")
    scale.add_argument("--size", choices=("1m", "30m"), default="1m", help="parameters of the model (default: 1m)")
    parser.add_argument(
        "--mixes", nargs="+", choices=MIXES, default=list(MIXES), help="with plain rows, without (default: both)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, help="processes that fine-tune (default: one per core; 1 on cuda)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"holds finished work (default: {FOLDER})")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path, help="a PNG; needs matplotlib")
    options = parser.parse_args(arguments)
    if not options.workers:
        options.workers = len(os.sched_getaffinity(0)) if options.device == "cpu" else 1
    return options


def chosen_study(options: argparse.Namespace) -> Study:
    if options.smoke:
        study = SMOKE
    elif options.quick:
        study = QUICK
    elif options.size == "30m":
        study = LARGE
    else:
        study = FULL
    return replace(study, methods={mix: names for mix, names in study.methods.items() if mix in options.mixes})


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    study = chosen_study(options)
    if not study.methods:
        sys.exit(
            "Got --mixes for which this study has no runs, expected 'mix' among them. Fix: leave --mixes or --smoke out."
        )
    if options.figure and find_spec("matplotlib") is None:
        sys.exit("Got --figure without matplotlib, expected it installed. Fix: pip install 'trl-miso[plots]'.")
    start_worker()
    start = time.perf_counter()
    try:
        with exclusive_lock(options.folder):
            minutes = estimate_seconds(study, options.device, options.workers) / 60
            print(f"estimate for the whole study: {minutes:.0f} minutes, from four steps timed now", flush=True)
            report = run_study(study, options.folder, options.device, options.workers)
    except ValueError as error:
        sys.exit(str(error))
    seconds = time.perf_counter() - start
    write_report(report, study, options.device, seconds, options.markdown, options.json, options.figure)


if __name__ == "__main__":
    main()
