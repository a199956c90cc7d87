"""`trl-miso readout`."""

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from trl_miso.cli.arguments import Parsed, RecipeParser
from trl_miso.cli.parser import count_from, output_file
from trl_miso.config import MISOSFTConfig
from trl_miso.readout.answers import generate_answers, verdicts_on
from trl_miso.readout.losses import read_answers
from trl_miso.readout.rows import prepare_rows, sample_rows
from trl_miso.readout.summary import summarize
from trl_miso.recipe import RecipeArguments, adapt_rows, first_rows, load_rows, load_tokenizer
from trl_miso.report.build import load_chat_template, load_model
from trl_miso.report.constraint_checks import ifeval_check, synthetic_check

_USAGE = "--model MODEL [-n ROWS] [--min_contexts N] [--generate] [--max_new_tokens N] [--json FILE]"
_ABOUT = """\
Show how a model, trained or not, reads several contexts: loss and token accuracy of the rows' answers by standard inference (the
full context alone) and under each weighting of the contexts, with paired 95 % intervals over rows. With --generate also how many
constraints the model's own answers follow (greedy), by standard inference and under each weighting; constraints are checked by
IFEval's instruction_id_list and kwargs of the rows (pip install 'trl-miso[eval]'). Nothing is trained.

Rows are drawn at random (--seed) among those that give several contexts. Contexts, tokens and labels are those of training with the
same options, which are those of `trl-miso sft` (--max_length, --output_positions, --response_template, --dtype, ...).
--per_device_eval_batch_size is the number of rows that are answered at once."""


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    options, recipe, args, model_args, _ = _parse(arguments)
    _check(options, model_args)
    check = None
    if options.generate:
        check = synthetic_check if recipe.dataset_name is None else ifeval_check()
    dataset, tokenizer = _load(recipe, args, model_args)
    sampled = sample_rows(dataset, args, options.num_rows, options.min_contexts, check)
    model = load_model(model_args.model_name_or_path, args, model_args)
    rows = prepare_rows(sampled, tokenizer, args, model.config.get_text_config().vocab_size)
    losses, refused = read_answers(
        model,
        rows,
        max_length=args.max_length,
        output_positions=args.output_positions,
        share_prefixes=args.share_prefixes,
        progress=_progress,
    )
    verdicts, refused_answers = None, None
    if check is not None:
        answers, refused_answers = generate_answers(
            model,
            tokenizer,
            rows,
            max_new_tokens=options.max_new_tokens or 512,
            batch_size=args.per_device_eval_batch_size,
            output_positions=args.output_positions,
            response_template=args.response_template,
            progress=_progress,
        )
        verdicts = {
            name: [verdicts_on(check, row.row, text) for row, text in zip(rows, texts, strict=True)]
            for name, texts in answers.items()
        }
    data = {
        "model": model_args.model_name_or_path,
        "dataset": recipe.dataset_name or "generated rows",
        "seed": args.seed,
        "max_new_tokens": (options.max_new_tokens or 512) if check else None,
        **summarize(sampled, rows, losses, refused, verdicts, refused_answers),
    }
    if options.json:
        options.json.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _print(data, Console())


def _parse(arguments: list[str]) -> Parsed:
    parser = RecipeParser("readout", _USAGE, _ABOUT)
    add = parser.add
    add("-n", "--num_rows", type=count_from(1), default=64, metavar="ROWS", help="rows to read (default: 64)")
    add("--min_contexts", type=count_from(2), default=2, metavar="N", help="fewest contexts of a row (default: 2)")
    add("--generate", action="store_true", help="also check the constraints that the model's own answers follow")
    add("--max_new_tokens", type=count_from(1), metavar="N", help="tokens per generated answer (default: 512)")
    add("--json", type=output_file, metavar="FILE", help="write the numbers, also row by row")
    return parser.parse(arguments)


def _check(options: argparse.Namespace, model_args: ModelConfig) -> None:
    if not model_args.model_name_or_path:
        raise ValueError("Got no model, expected --model. Fix: give --model a folder or an id on the Hub.")
    if options.max_new_tokens and not options.generate:
        raise ValueError("Got --max_new_tokens without --generate, expected both or neither. Fix: add --generate.")


def _load(
    recipe: RecipeArguments, args: MISOSFTConfig, model_args: ModelConfig
) -> tuple[Dataset, PreTrainedTokenizerBase]:
    """The rows to draw from, and the model's tokenizer."""
    dataset, _ = first_rows(load_rows(recipe, recipe.dataset_train_split), None)
    tokenizer = load_tokenizer(dataset, args, model_args)
    if args.chat_template_path:
        tokenizer.chat_template = load_chat_template(args.chat_template_path)
    return adapt_rows(dataset, recipe), tokenizer


def _progress(items: Sequence[Any], doing: str) -> Iterable[Any]:
    return track(items, doing, console=Console(stderr=True))


def _print(data: dict[str, Any], console: Console) -> None:
    """Print the tables, the readings that are impossible, and the sentence in words."""
    rows = data["rows"]
    _line(
        console,
        f"{rows['read']} rows of {data['dataset']} with several contexts ({data['contexts']:.1f} on average), drawn with seed "
        f"{data['seed']}; {rows['looked_at']} rows looked at",
    )
    for reason, left_out in rows["left_out"].items():
        rows_left_out = "1 row" if left_out["rows"] == 1 else f"{left_out['rows']} rows"
        _line(console, f"  left out: {rows_left_out} (first: {left_out['first_row']}), {reason}")
    console.print(_answers_table(data))
    if data["followed"]:
        console.print(_followed_table(data))
    for kind, refused in (("not read", data["refused"]), ("not answered", data["refused_answers"])):
        for name, reason in refused.items():
            _line(console, f"{name}: {kind}. {reason}")
    _line(console, data["in_words"])


def _answers_table(data: dict[str, Any]) -> Table:
    title = f"The rows' answers, {data['tokens']} tokens"
    table = _table(title, "loss", "difference", "accuracy, %", "difference, points")
    for name, loss in data["loss"].items():
        accuracy = data["accuracy"][name]
        cells = f"{loss['value']:.4f}", _change(loss, 1, 4), f"{100 * accuracy['value']:.2f}", _change(accuracy, 100, 2)
        table.add_row(Text(name), *cells)
    table.caption = (
        "Loss per token; accuracy: tokens predicted first. Differences to standard inference with 95 % intervals, paired by row. "
        "full 1/2: full_context_weight=0.5"
    )
    return table


def _followed_table(data: dict[str, Any]) -> Table:
    title = f"Constraints that the model's own answers follow, of {data['constraints']}; greedy, {data['max_new_tokens']} tokens"
    table = _table(title, "followed", "%", "difference, points")
    for name, followed in data["followed"].items():
        count = round(followed["value"] * data["constraints"])
        table.add_row(Text(name), str(count), f"{100 * followed['value']:.1f}", _change(followed, 100, 1))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE, title_justify="left", caption_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _change(line: dict[str, Any], scale: float, digits: int) -> str:
    if line["difference"] is None:
        return ""
    change = f"{scale * line['difference']:+.{digits}f}"
    if line["interval"]:
        low, high = line["interval"]
        change += f" ({scale * low:+.{digits}f} to {scale * high:+.{digits}f})"
    return change


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
