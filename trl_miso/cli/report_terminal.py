"""The report's figures in a terminal."""

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

_KINDS = {
    "output": "the output itself",
    "constraint": "constraints",
    "base": "base instruction",
    "system": "system",
    "earlier": "earlier turns",
    "rest": "markup and the rest",
}


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print one table a question: where attention goes, by constraints, what is followed, several contexts."""
    rows, models = report["rows"], report["models"]
    answers = "answers of the models" if report["answers"] == "generated" else "the rows' own answers"
    said = f"{rows['measured']} of {rows['read']} rows of {rows['dataset']}, {answers}, standard attention"
    console.print(said, markup=False, highlight=False)
    for reason, found in rows["skipped"].items():
        console.print(
            f"  left out: {found['rows']} rows (first: {found['first_row']}), {reason}", markup=False, highlight=False
        )
    names = [Text(model["name"][-30:]) for model in models]
    for table in filter(
        None, (_kinds(report, names), _constraints(models, names), _followed(models), _dilution(models))
    ):
        console.print(table)


def _table(title: str, *columns: str | Text) -> Table:
    made = Table(title=title, box=SIMPLE, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    return made


def _kinds(report: dict[str, Any], names: list[Text]) -> Table:
    compared, models = report["compared"], report["models"]
    made = _table("Where answers look (mean share of attention)", "", *names, *(["change"] if compared else []))
    for kind, label in _KINDS.items():
        shares = [model["kinds"][kind] for model in models]
        if any(shares):
            made.add_row(label, *map(_percent, shares), *([_change(compared[kind])] if compared else []))
    return made


def _constraints(models: list[dict[str, Any]], names: list[Text]) -> Table | None:
    if not any(model["kinds"]["constraint"] for model in models):
        return None
    made = _table(
        "By number of constraints: attention on each (on one alone), how many are followed",
        "constraints",
        "rows",
        *names,
    )
    by_number = [{line["constraints"]: line for line in model["by_constraints"]} for model in models]
    for number in sorted(set().union(*by_number)):
        lines = [lines.get(number) for lines in by_number]
        each = ["-" if line is None else _each(line) for line in lines]
        made.add_row(str(number), str(max(line["rows"] for line in lines if line)), *each)
    return made


def _each(line: dict[str, Any]) -> str:
    known = f"  {line['followed']}/{line['known']}" if line["known"] else ""
    return f"{_percent(line['mass_each'])} ({_percent(line['mass_alone'])}){known}"


def _followed(models: list[dict[str, Any]]) -> Table | None:
    if not any(model["relation"]["mass"]["constraints"] for model in models):
        return None
    made = _table("Attention and what is followed", "", "followed", "others", "AUC", "within rows")
    for model in models:
        for name, found in model["relation"].items():
            means = [
                "-" if found[key] is None else f"{100 * found[key]:.2f} %" for key in ("mean_followed", "mean_others")
            ]
            counts = found["followed"], found["constraints"] - found["followed"]
            cells = [f"{mean} (n={count})" for mean, count in zip(means, counts, strict=True)]
            label = Text(f"{model['name'][-30:]}, {name.replace('mass_per', 'per').replace('_', ' ')}")
            made.add_row(label, *cells, _interval(found["auc"]), _interval(found["auc_in_row"]))
    made.caption = (
        "AUC: how often a followed constraint has more than another; 0.5 is no relation; 95 % bootstrap over rows"
    )
    return made


def _dilution(models: list[dict[str, Any]]) -> Table | None:
    if not any(model["dilution"] for model in models):
        return None
    made = _table(
        "The output's share under several contexts", "", "contexts", "rows", "uniform", "fid", "vanilla", "eq. 6"
    )
    for model in models:
        for line in model["dilution"]:
            shares = (line[name] for name in ("uniform", "fid", "vanilla", "equation 6"))
            cells = ["-" if share is None else _percent(share) for share in shares]
            made.add_row(Text(model["name"][-30:]), str(line["contexts"]), str(line["rows"]), *cells)
    return made


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _change(found: dict[str, Any]) -> str:
    interval = found["interval"]
    return f"{100 * found['mean']:+.1f}" + (
        " ({:+.1f} to {:+.1f})".format(*(100 * x for x in interval)) if interval else ""
    )


def _interval(found: list[float] | None) -> str:
    return "too few" if found is None else "{:.2f} ({:.2f} to {:.2f})".format(*found)
