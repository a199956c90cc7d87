"""`trl-miso verify`: check that MISO is exact on a model and its rows, without training."""

import tempfile

from trl_miso.cli.arguments import command_parser, count_from, parse_command
from trl_miso.recipe import make_trainer
from trl_miso.verification.run import ROWS_READ_PER_EXAMPLE

_USAGE = "trl-miso verify [DATASET] [-n ROWS] [--config RECIPE.yaml] [options of a recipe]"
_ABOUT = """\
Check on a model, its tokenizer and some of its first rows that MISO is exact, and print the results and the seconds they took as
a table. Nothing is trained or saved. The exit status is 1 if a check fails.

DATASET is an id on the Hub, a folder, or a .jsonl, .json, .csv or .parquet file. Without DATASET, rows are generated. Every option
of examples/train_crab.py can be given (--model_name_or_path, --context_mode, --bf16, --use_peft, ...)."""


def main(arguments: list[str]) -> None:
    """Run the command. Raises ValueError if a check fails."""
    parser = command_parser(_USAGE, _ABOUT)
    parser.add_argument(
        "-n", type=count_from(1), default=8, metavar="ROWS", help="number of rows to check on (default: 8)"
    )
    options, (recipe, args, model_args) = parse_command(parser, arguments)
    if recipe.dataset_name and "[" not in recipe.dataset_train_split and not recipe.dataset_streaming:
        recipe.dataset_train_split += f"[:{ROWS_READ_PER_EXAMPLE * options.n}]"  # the checks read no more
    args.eval_strategy, args.push_to_hub, args.report_to, args.packing = "no", False, [], False
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        make_trainer(recipe, args, model_args).verify(options.n)
