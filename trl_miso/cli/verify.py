"""`trl-miso verify`: check that MISO is exact on a model and its rows, without training."""

import tempfile

from trl_miso.cli.arguments import RecipeParser
from trl_miso.cli.parser import count_from
from trl_miso.recipe import make_trainer
from trl_miso.verification.run import ROWS_READ_PER_EXAMPLE

_USAGE = "[-n ROWS]"
_ABOUT = """\
Check on a model, its tokenizer and some of its first rows that MISO is exact, and print the results and the seconds they took as
a table. Nothing is trained or saved. The exit status is 1 if a check fails. Takes the options of `trl-miso sft` (--model,
--context_mode, --bf16, --use_peft, ...)."""


def main(arguments: list[str]) -> None:
    """Run the command. Raises ValueError if a check fails."""
    parser = RecipeParser("verify", _USAGE, _ABOUT)
    parser.add("-n", "--num_rows", type=count_from(1), default=8, metavar="ROWS", help="rows to check on (default: 8)")
    options, recipe, args, model_args, _ = parser.parse(arguments)
    if recipe.dataset_name and "[" not in recipe.dataset_train_split and not recipe.dataset_streaming:
        recipe.dataset_train_split += f"[:{ROWS_READ_PER_EXAMPLE * options.num_rows}]"  # the checks read no more
    args.eval_strategy, args.push_to_hub, args.report_to, args.packing = "no", False, [], False
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        make_trainer(recipe, args, model_args).verify(options.num_rows)
