"""
Which method teaches a real model to follow several constraints? The paper's comparison on real weights.

    python -m benchmarks.real_study --model smollm2 --prompts FILE --ifeval FILE --bases FILE --markdown FILE
    python -m benchmarks.real_study --size quick --model smollm2 --prompts FILE --ifeval FILE --bases FILE   # minutes on 2 cores
    python -m benchmarks.real_study --size full --device cuda --workers 8 --model smollm2 --prompts FILE ... # minutes on a large GPU

Rows are made on the spot: real prompts, answers by the model itself (or given ones), constraints back-translated from the answers
by lm-eval's checkers. Each method fine-tunes the model with `MISOSFTTrainer`; the result is tested by standard inference: one context,
greedy. The learning rate of each method is chosen on rows of their own. Finished work is kept in a ledger: a study that was killed
resumes, and `--report` prints what there is.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common.folders import exclusive_lock
from benchmarks.common.real_models import MODELS, add_punkt_tab, real_model
from benchmarks.real_study.grid import Files, Workshop, code_version, run_grid
from benchmarks.real_study.study import FULL, MEDIUM, METHODS, QUICK, SMALL

FOLDER = Path.home() / ".cache" / "trl-miso" / "real_study"
SIZES = {"full": FULL, "medium": MEDIUM, "small": SMALL, "quick": QUICK}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, help=f"{', '.join(MODELS)}, or a checkpoint folder with a chat template"
    )
    parser.add_argument("--prompts", required=True, help="JSON lines with 'prompt', and 'answer' for --answers given")
    parser.add_argument("--ifeval", help="IFEval's input_data.jsonl (default: the Hub's data set)")
    parser.add_argument("--bases", help="ifeval_wo_instructions.jsonl, for IFEval-Flatten (default: without it)")
    parser.add_argument("--chat_template", help="a template file, for a base model")
    parser.add_argument("--eos_token", help="the token that ends that template's turns")
    parser.add_argument("--answers", choices=("own", "given"), default="own", help="who wrote the training answers")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--quick", action="store_true", help="the same as --size quick")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, help="processes (default: one per core; 8 on cuda)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"holds finished work (default: {FOLDER})")
    parser.add_argument("--report", action="store_true", help="run nothing; report on the methods that are finished")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args(arguments)
    if not options.workers:
        options.workers = len(os.sched_getaffinity(0)) if options.device == "cpu" else 8
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    study = QUICK if options.quick else SIZES[options.size]
    study = replace(study, answers=options.answers, methods=tuple(options.methods))
    model = str(real_model(options.model)) if options.model in MODELS else options.model
    files = Files(model, options.prompts, options.ifeval, options.bases, options.chat_template, options.eos_token)
    workshop = Workshop(study, files, options.folder, options.device, code_version())
    add_punkt_tab()
    start = time.perf_counter()

    def advance(line: str) -> None:
        print(f"[{(time.perf_counter() - start) / 60:6.1f} min] {line}", flush=True)

    try:
        if not options.report:
            with exclusive_lock(options.folder):
                run_grid(workshop, options.workers, advance)
        from benchmarks.real_study.report import write_report

        write_report(workshop, options.markdown)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
