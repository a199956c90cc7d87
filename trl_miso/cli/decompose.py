"""`trl-miso decompose`."""

import argparse
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_miso.cli.eval_arguments import add_model_arguments, model_request
from trl_miso.cli.parser import CommandParser, count_from, output_file
from trl_miso.data.mapping import of_this_code
from trl_miso.decompose.answers import with_verdicts
from trl_miso.decompose.asking import RESPONSE_FORMAT, ask_for_quotes, kept_quotes, question
from trl_miso.decompose.rows import decompose_row, decomposed_features, with_quotes
from trl_miso.evaluation.asking import ATTEMPTS, AskAll, Estimate
from trl_miso.evaluation.endpoint import Endpoint
from trl_miso.evaluation.ifeval import load_scorer
from trl_miso.evaluation.inference import ModelRequest, ask_local
from trl_miso.evaluation.model_fingerprint import model_fingerprint
from trl_miso.recipe import RecipeArguments, adapt_rows, apply_adapter, load_rows

_USAGE = "ROWS [OUT] [--preview] [-n ROWS] [--model MODEL [--backend openai|transformers|vllm] [--dry_run] ...]"
_ABOUT = """\
Split instructions that hold their constraints in the text into a base instruction and a list of constraints, which MISO-para trains on.
ROWS have `messages`, or `prompt` and `completion`: an id on the Hub, a folder, or a .jsonl, .json, .csv or .parquet file. OUT is a .jsonl or
.parquet file: prompt, constraints, completion, full_prompt (the instruction verbatim), constraint_spans (characters of the instruction),
instruction_id_list and kwargs (IFEval's checkers, where a constraint has one), answer_follows (their verdicts on the answer),
left_out (words in neither base nor constraints), and miso_status, which says how the row was split or why not. Rows that are not
split keep their instruction, and are trained as plain rows.

The rules take items of lists, IFEval's descriptions, and clauses that state a requirement on the answer's form: its length, format, words, case,
punctuation. They rewrite nothing and need no model. python -m benchmarks.decomposition measures them.

With --model a model is asked about the instructions in which the rules find nothing (--ask all: about every instruction). It only quotes: what
does not stand in the instruction is left out and counted. Its answers are kept in --answers, and a killed run resumes from there. --backend openai asks
any OpenAI-compatible server (key in OPENAI_API_KEY); --dry_run says before what that will cost."""
_WRITERS = (".jsonl", ".parquet")


def main(arguments: list[str]) -> None:
    """Run the command."""
    options, request = _parse(arguments)
    recipe = RecipeArguments(dataset_name=options.rows, dataset_train_split=options.split)
    rows = adapt_rows(load_rows(recipe, options.split), recipe)
    if isinstance(rows, IterableDataset):
        raise ValueError("Got a stream, expected rows that can be read at once. Fix: give a file or a data set.")
    console = Console()
    split = apply_adapter(
        rows, decompose_row, decomposed_features(), rows.column_names, desc="Decomposing instructions"
    )
    reasons: dict[str, str] = {}
    if request is not None:
        texts = [row["full_prompt"][-1]["content"] for row in split if _asks_about(row, options.ask)]
        source = model_fingerprint(request.model, request.backend, request.base_url)
        if options.dry_run:
            _say(console, _announcement(texts, request, source, options))
            return
        # A local model's greedy answer would be the same again.
        attempts = ATTEMPTS if request.backend == "openai" else 1
        quotes, reasons = ask_for_quotes(texts, request.model, source, _ask_all(request), options.answers, attempts)
        split = split.map(of_this_code(partial(_asked, quotes=quotes, ask=options.ask)), desc="Splitting at quotations")
    split, unchecked = _check_answers(split)
    if options.preview:
        for number in range(min(options.num_rows, len(split))):
            _show(console, number, split[number])
    for line in [*_counts(split), *unchecked]:
        _say(console, line)
    if options.out is not None:
        (split.to_json if options.out.suffix == ".jsonl" else split.to_parquet)(str(options.out))
        _say(console, f"Wrote {options.out}")
    if reasons:
        raise SystemExit(
            f"Got no readable answer about {len(reasons)} instructions, which stay whole (miso_status no_answer). The first: "
            f"{next(iter(reasons.values()))} Fix: repeat the command, which asks about these instructions only."
        )


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, ModelRequest | None]:
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
    add_model_arguments(parser)
    group = parser.add_argument_group("asking the model for constraints")
    group.add_argument(
        "--ask",
        choices=["rest", "all"],
        default="rest",
        help="about instructions without a split by rules, or about all",
    )
    group.add_argument(
        "--answers", type=output_file, metavar="FILE", help="JSONL of the model's answers (default: OUT.answers.jsonl)"
    )
    group.add_argument(
        "--prices", type=float, nargs=2, metavar=("IN", "OUT"), help="prices per million tokens, to estimate the cost"
    )
    group.add_argument("--dry_run", action="store_true", help="print what asking will cost, and stop before it")
    parser.set_defaults(max_new_tokens=1024)
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.suffix not in _WRITERS:
        raise ValueError(
            f"Got OUT {str(options.out)!r}, expected a file {' or '.join(_WRITERS)}. Fix: change its name."
        )
    request = model_request(options)
    if request is None:
        for name in ("answers", "prices", "dry_run"):
            if getattr(options, name):
                raise ValueError(f"Got --{name} without --model, expected both or neither. Fix: give --model.")
    elif options.answers is None:
        if options.out is None:
            raise ValueError("Got --model without OUT, expected a file for the rows. Fix: give OUT, or --answers.")
        options.answers = Path(f"{options.out}.answers.jsonl")
    return options, request


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _asks_about(row: dict[str, Any], ask: str) -> bool:
    statuses = ("no_constraints", "only_constraints") + (("split",) if ask == "all" else ())
    return row["miso_status"] in statuses


def _asked(row: dict[str, Any], quotes: dict[str, list[str]], ask: str) -> dict[str, Any]:
    return with_quotes(row, quotes) if _asks_about(row, ask) else row


def _ask_all(request: ModelRequest) -> AskAll:
    if request.backend != "openai":
        return partial(ask_local, request)
    return Endpoint(
        request.model,
        max_tokens=request.max_new_tokens,
        response_format=RESPONSE_FORMAT,
        **request.settings(),
    ).ask_all


def _announcement(texts: list[str], request: ModelRequest, source: str | None, options: argparse.Namespace) -> str:
    """What asking will cost."""
    asked = dict.fromkeys(texts)
    kept = kept_quotes(options.answers, list(asked), request.model, source)
    estimate = Estimate.of([question(text) for text in asked if text not in kept], request.max_new_tokens)
    message = (
        f"{estimate.requests:,} of {len(asked):,} instructions to ask {request.model} about: about {estimate.input_tokens:,} tokens in "
        f"(estimated from characters), at most {estimate.output_tokens:,} out (--max_new_tokens each), not counting instructions that "
        "are asked about again"
    )
    return estimate.priced(message, options.prices)


def _check_answers(split: Dataset) -> tuple[Dataset, list[str]]:
    """Check the answers by IFEval's checkers; without lm-eval or its data say so, and leave them unchecked."""
    if not any(name for names in split["instruction_id_list"] for name in names):
        return split, []
    try:
        score = load_scorer()
    except (ImportError, ValueError) as error:
        return split, [f"The answers were not checked (answer_follows is null). {error}"]
    checked = split.map(partial(with_verdicts, score=score), desc="Checking answers", load_from_cache_file=False)
    return checked, []


def _show(console: Console, number: int, row: dict[str, Any]) -> None:
    """The instruction with its constraints marked, and beside it the base instruction and the constraints."""
    text = Text(row["full_prompt"][-1]["content"] if row["full_prompt"] else "")
    for begin, end in row["constraint_spans"]:
        text.stylize("bold green underline", begin, end)
    parts = Text()
    if row["constraints"]:
        parts += Text(row["prompt"][-1]["content"] + "\n")
    columns = (row["constraints"], row["constraint_rules"], row["instruction_id_list"], row["answer_follows"])
    for constraint, rule, checker, follows in zip(*columns, strict=True):
        parts += Text(f"\n{rule:6} ", "dim") + Text(constraint, "green")
        if checker:
            parts += Text(f"  {checker}", "dim")
        if follows is False:
            parts += Text("  the answer breaks it", "bold red")
    for name, words in (("in neither", row["left_out"]), ("not in the instruction", row["not_found"])):
        if words:
            parts += Text(f"\n{name}: ", "dim") + Text(" | ".join(words))
    console.rule(f"row {number}: {row['miso_status']}", align="left")
    if not parts:
        console.print(text, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column("instruction", ratio=1)
    table.add_column("base and constraints", ratio=1)
    table.add_row(text, parts)
    console.print(table)


def _counts(split: Dataset) -> list[str]:
    statuses = Counter(split["miso_status"])
    constraints = sum(map(len, split["constraints"]))
    lines = [f"{statuses['split']} of {len(split)} rows were split, into {constraints} constraints."]
    for status, count in statuses.most_common():
        if status != "split":
            lines.append(f"  not split: {count} {status}")
    checkers = sum(name is not None for names in split["instruction_id_list"] for name in names)
    if checkers:
        lines.append(f"{checkers} constraints have one of IFEval's checkers.")
    broken = sum(False in follows for follows in split["answer_follows"])
    if broken:
        lines.append(f"{broken} rows have an answer that breaks one of its constraints (false in answer_follows).")
    not_found = sum(map(len, split["not_found"]))
    if not_found:
        lines.append(
            f"{not_found} quotations of the model do not stand in their instruction, or overlap: left out (not_found)."
        )
    return lines
