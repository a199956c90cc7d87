"""The checks as a table for the terminal and for error messages."""

import io
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from trl_miso.verification.checks import Check

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "dim"}


def make_table(checks: Sequence[Check], cost: str = "") -> Table:
    """One line per check: its result, the measured difference and the budget. The caption begins with the cost."""
    table = Table(
        title="MISO on this model, tokenizer and rows",
        box=SIMPLE,
        caption=f"{cost}\n" * bool(cost) + "at most: four times the effect of rounding, measured on this model",
    )
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("off by", justify="right", no_wrap=True)
    table.add_column("at most", justify="right", no_wrap=True)
    table.add_column("")
    for check in checks:
        off_by, at_most = ("" if x is None else f"{x:.2g} {check.unit}" for x in (check.measured, check.budget))
        table.add_row(check.name, check.status, off_by, at_most, check.note, style=_STYLES[check.status])
    return table


def as_text(checks: Sequence[Check]) -> str:
    """The table without colours, 120 columns wide."""
    text = io.StringIO()
    Console(file=text, width=120, no_color=True).print(make_table(checks))
    return text.getvalue()
