"""Print a report's numbers as tables in a terminal."""

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
    """Print one table per question: where attention goes, by number of constraints, by verdict, under several contexts."""
    rows, models = report["rows"], report["models"]
    answers = "the models' own answers" if report["answers"] == "generated" else "the rows' own answers"
    heading = f"{rows['measured']} of {rows['read']} rows of {rows['dataset']}, {answers}, standard attention"
    console.print(heading, markup=False, highlight=False)
    for reason, skipped in rows["skipped"].items():
        rows_left_out = "1 row" if skipped["rows"] == 1 else f"{skipped['rows']} rows"
        line = f"  left out: {rows_left_out} (first: {skipped['first_row']}), {reason}"
        console.print(line, markup=False, highlight=False)
    names = [Text(model["name"][-30:]) for model in models]
    tables = (_kinds(report, names), _constraints(models, names), _followed(models), _dilution(models))
    for table in tables:
        if table:
            console.print(table)


def _table(title: str, *columns: str | Text) -> Table:
    table = Table(title=title, box=SIMPLE, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _kinds(report: dict[str, Any], names: list[Text]) -> Table:
    compared, models = report["compared"], report["models"]
    table = _table("Where attention goes (mean share)", "", *names, *(["change"] if compared else []))
    for kind, label in _KINDS.items():
        shares = [model["kinds"][kind] for model in models]
        if any(shares):
            cells = [_percent(share) for share in shares]
            if compared:
                cells.append(_change(compared[kind]))
            table.add_row(label, *cells)
    return table


def _constraints(models: list[dict[str, Any]], names: list[Text]) -> Table | None:
    if not any(model["kinds"]["constraint"] for model in models):
        return None
    title = "By number of constraints: attention on each (if alone in the prompt), followed / checked"
    table = _table(title, "constraints", "rows", *names)
    by_number = [{line["constraints"]: line for line in model["by_constraints"]} for model in models]
    for number in sorted(set().union(*by_number)):
        lines = [lines.get(number) for lines in by_number]
        rows = max(line["rows"] for line in lines if line)
        table.add_row(str(number), str(rows), *("-" if line is None else _each(line) for line in lines))
    return table


def _each(line: dict[str, Any]) -> str:
    verdicts = f"  {line['followed']}/{line['known']}" if line["known"] else ""
    return f"{_percent(line['mass_each'])} ({_percent(line['mass_alone'])}){verdicts}"


def _followed(models: list[dict[str, Any]]) -> Table | None:
    if not any(model["relation"]["mass"]["constraints"] for model in models):
        return None
    title = "Attention on constraints that are followed, and on others"
    table = _table(title, "", "followed", "not followed", "AUC", "AUC within rows")
    for model in models:
        for name, relation in model["relation"].items():
            label = Text(f"{model['name'][-30:]}, {'attention' if name == 'mass' else 'attention per token'}")
            table.add_row(
                label,
                _mean(relation["mean_followed"], relation["followed"]),
                _mean(relation["mean_others"], relation["constraints"] - relation["followed"]),
                _interval(relation["auc"]),
                _interval(relation["auc_in_row"]),
            )
    table.caption = (
        "AUC: how often a followed constraint has more attention than one that is not followed; 0.5 is no relation; "
        "95 % bootstrap over rows"
    )
    return table


def _dilution(models: list[dict[str, Any]]) -> Table | None:
    if not any(model["dilution"] for model in models):
        return None
    title = "The output's share under several contexts"
    table = _table(title, "", "contexts", "rows", "uniform", "fid", "vanilla", "eq. 6")
    for model in models:
        for line in model["dilution"]:
            shares = (line[name] for name in ("uniform", "fid", "vanilla", "equation 6"))
            cells = ["-" if share is None else _percent(share) for share in shares]
            table.add_row(Text(model["name"][-30:]), str(line["contexts"]), str(line["rows"]), *cells)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _mean(share: float | None, count: int) -> str:
    return f"- (n={count})" if share is None else f"{100 * share:.2f} % (n={count})"


def _change(difference: dict[str, Any]) -> str:
    change = f"{100 * difference['mean']:+.1f}"
    if difference["interval"]:
        low, high = difference["interval"]
        change += f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return change


def _interval(auc: list[float] | None) -> str:
    return "too few" if auc is None else "{:.2f} ({:.2f} to {:.2f})".format(*auc)
