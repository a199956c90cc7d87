"""`trl-miso decompose`."""

from collections import Counter
from typing import Any

from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.text import Text

from trl_miso.cli.parser import CommandParser, count_from, output_file
from trl_miso.decompose.rows import decompose_row, decomposed_features
from trl_miso.recipe import RecipeArguments, adapt_rows, apply_adapter, load_rows

_USAGE = "ROWS [OUT] [--preview] [-n ROWS]"
_ABOUT = """\
Split instructions that hold their constraints in the text into a base instruction and a list of constraints, which MISO-para trains on.
ROWS have `messages`, or `prompt` and `completion`: an id on the Hub, a folder, or a .jsonl, .json, .csv or .parquet file. OUT is a .jsonl or
.parquet file: prompt, constraints, completion, full_prompt (the instruction verbatim), constraint_spans (characters of the instruction),
left_out (its words in neither), and miso_status, which says how the row was split or why not. Rows that are not split keep their
instruction, and are trained as plain rows.

The rules take items of lists and clauses that state a requirement on the answer's form: its length, format, words, case, punctuation. They
rewrite nothing and need no model. python -m benchmarks.decomposition measures them."""
_WRITERS = (".jsonl", ".parquet")


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser = CommandParser("decompose", _USAGE, _ABOUT)
    parser.add_argument("rows", metavar="ROWS", help="the rows to split")
    parser.add_argument(
        "out", metavar="OUT", type=output_file, nargs="?", help="the file to write (default: only count)"
    )
    parser.add_argument(
        "--preview", action="store_true", help="show rows, with their constraints marked, before the counts"
    )
    parser.add_argument(
        "-n", "--num_rows", type=count_from(1), default=10, metavar="ROWS", help="rows to show (default: %(default)s)"
    )
    parser.add_argument("--split", default="train", help="split of ROWS (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.suffix not in _WRITERS:
        raise ValueError(
            f"Got OUT {str(options.out)!r}, expected a file {' or '.join(_WRITERS)}. Fix: change its name."
        )
    recipe = RecipeArguments(dataset_name=options.rows, dataset_train_split=options.split)
    rows = adapt_rows(load_rows(recipe, options.split), recipe)
    if isinstance(rows, IterableDataset):
        raise ValueError("Got a stream, expected rows that can be read at once. Fix: give a file or a data set.")
    desc = "Decomposing instructions"
    split = apply_adapter(rows, decompose_row, decomposed_features(), rows.column_names, desc)
    console = Console()
    if options.preview:
        for number in range(min(options.num_rows, len(split))):
            _show(console, number, split[number])
    for line in _counts(split):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.out is not None:
        (split.to_json if options.out.suffix == ".jsonl" else split.to_parquet)(str(options.out))
        console.print(f"Wrote {options.out}", markup=False, highlight=False, soft_wrap=True)


def _show(console: Console, number: int, row: dict[str, Any]) -> None:
    """The instruction with its constraints marked, and below it the base instruction."""
    text = Text(row["full_prompt"][-1]["content"] if row["full_prompt"] else "")
    for begin, end in row["constraint_spans"]:
        text.stylize("bold green underline", begin, end)
    console.rule(f"row {number}: {row['miso_status']}", align="left")
    console.print(text, soft_wrap=True)
    if row["constraints"]:
        console.print(Text("base: ", "bold") + Text(row["prompt"][-1]["content"]), soft_wrap=True)
        for constraint, rule in zip(row["constraints"], row["constraint_rules"], strict=True):
            console.print(Text(f"  {rule:6} ", "dim") + Text(constraint), soft_wrap=True)
    if row["left_out"]:
        console.print(Text("  in neither: ", "dim") + Text(" | ".join(row["left_out"])), soft_wrap=True)


def _counts(split: Dataset) -> list[str]:
    statuses = Counter(split["miso_status"])
    constraints = sum(map(len, split["constraints"]))
    lines = [f"{statuses['split']} of {len(split)} rows were split, into {constraints} constraints."]
    for status, count in statuses.most_common():
        if status != "split":
            lines.append(f"  not split: {count} {status}")
    return lines
