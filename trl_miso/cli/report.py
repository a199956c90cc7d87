"""`trl-miso report`."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from trl_miso.cli.arguments import Parsed, RecipeParser
from trl_miso.cli.parser import count_from, output_file
from trl_miso.cli.report_terminal import print_report
from trl_miso.config import MISOSFTConfig
from trl_miso.recipe import RecipeArguments, adapt_rows, first_rows, load_rows, load_tokenizer
from trl_miso.recipes import check_path
from trl_miso.report.build import (
    build_report,
    check_same_prompts,
    load_chat_template,
    load_model,
    make_sampler,
    sample_rows,
    with_placeholder_answer,
    write_report,
)
from trl_miso.report.constraint_checks import ifeval_check, synthetic_check
from trl_miso.report.meters import SCORES_AT_ONCE
from trl_miso.report.plots import require_matplotlib
from trl_miso.report.samples import Sample

_USAGE = "--model MODEL [--compare MODEL] [-n ROWS] [--row N] [--generate] [--output_dir DIR] [--html FILE]"
_ABOUT = f"""\
Measure on multi-constraint rows how much attention a model's answers give to each constraint, to the base instruction and to the
output itself; whether the answers follow the constraints; and how several contexts change the output's share. With --compare, for
two models (before and after training) side by side. Writes report.html, report.json, masses.npz and PNG figures to --output_dir.

The answers are the completions of the rows, whatever train_turns says (earlier answers have no constraints to follow), or with
--generate each model's own (greedy, standard inference). Constraints are checked where
the rows have IFEval's instruction_id_list and kwargs (pip install 'trl-miso[eval]'); other constraints count as unknown.

Takes the options of `trl-miso sft` (--context_weighting, --max_length, --dtype, --source, ...). The model reads one row at a time.
Beside its forward pass this takes two arrays of {4 * SCORES_AT_ONCE // 1_000_000} MB (or of one token's scores): no attention matrix is kept."""


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    options, recipe, args, model_args, _ = _parse(arguments)
    require_matplotlib()
    names = _model_names(options, model_args)
    if options.max_new_tokens and not options.generate:
        raise ValueError("Got --max_new_tokens without --generate, expected both or neither. Fix: add --generate.")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model_args.model_name_or_path = names[0]
    dataset, tokenizer = _load(recipe, args, model_args, names, options)
    sampler = make_sampler(dataset, tokenizer, args, options.generate)
    report, arrays = build_report(
        names,
        lambda name: load_model(name, args, model_args),
        sampler,
        sample_rows(dataset, sampler, recipe.dataset_name or "generated rows"),
        synthetic_check if recipe.dataset_name is None else ifeval_check(),
        weighting=args.context_weighting,
        row=options.row,
        max_new_tokens=options.max_new_tokens or 512,
        progress=_progress,
    )
    page = options.html or folder / "report.html"
    write_report(report, arrays, folder, page)
    print_report(report, Console())
    Console().print(f"Wrote {page}", markup=False, highlight=False, soft_wrap=True)


def _parse(arguments: list[str]) -> Parsed:
    parser = RecipeParser("report", _USAGE, _ABOUT)
    add = parser.add
    add("--compare", metavar="MODEL", help="the model after training")
    add("-n", "--num_rows", type=count_from(1), default=32, metavar="ROWS", help="rows to read (default: 32)")
    add("--row", type=count_from(0), metavar="N", help="row to show token by token (default: the first)")
    add("--generate", action="store_true", help="measure each model's own answers instead of the rows' answers")
    add("--max_new_tokens", type=count_from(1), metavar="N", help="tokens per generated answer (default: 512)")
    add("--output_dir", metavar="DIR", help="folder of the report (default: miso-report)")
    add(
        "--html",
        type=output_file,
        metavar="FILE",
        help="write the page to this file (default: report.html in the folder)",
    )
    return parser.parse(arguments, output_dir="miso-report")


def _model_names(options: argparse.Namespace, model_args: ModelConfig) -> list[str]:
    model = model_args.model_name_or_path
    if not model or options.compare == model:
        names = [name for name in (model, options.compare) if name]
        raise ValueError(
            f"Got {names} as models, expected --model, and optionally another one to --compare it with. Fix: give --model a folder or "
            "an id on the Hub."
        )
    names = [model, options.compare] if options.compare else [model]
    for name in names:
        check_path(name)
    return names


def _load(
    recipe: RecipeArguments, args: MISOSFTConfig, model_args: ModelConfig, names: list[str], options: argparse.Namespace
) -> tuple[Dataset, PreTrainedTokenizerBase]:
    """The rows to measure and the tokenizer of all models."""
    dataset, _ = first_rows(load_rows(recipe, recipe.dataset_train_split), options.num_rows)
    tokenizer = load_tokenizer(dataset, args, model_args)
    if args.chat_template_path:
        tokenizer.chat_template = load_chat_template(args.chat_template_path)
    check_same_prompts(tokenizer, names, args.chat_template_path)
    if options.generate and "prompt" in dataset.column_names and "completion" not in dataset.column_names:
        dataset = dataset.map(with_placeholder_answer)
    return adapt_rows(dataset, recipe), tokenizer


def _progress(samples: Sequence[Sample], doing: str) -> Iterable[Sample]:
    return track(samples, doing, console=Console(stderr=True))
