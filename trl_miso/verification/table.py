"""The checks as a table."""

import io
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from trl_miso.verification.checks import Check

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "dim"}


def table(checks: Sequence[Check]) -> Table:
    """One line a check: what was measured, what rounding explains."""
    made = Table(
        title="MISO on this model, tokenizer and rows",
        box=SIMPLE,
        caption="at most: four times what rounding does to them",
    )
    made.add_column("check", no_wrap=True)
    made.add_column("", no_wrap=True)
    made.add_column("off by", justify="right", no_wrap=True)
    made.add_column("at most", justify="right", no_wrap=True)
    made.add_column("")
    for check in checks:
        off_by, at_most = ("" if x is None else f"{x:.2g} {check.unit}" for x in (check.measured, check.budget))
        made.add_row(check.name, check.status, off_by, at_most, check.note, style=_STYLES[check.status])
    return made


def as_text(checks: Sequence[Check]) -> str:
    written = io.StringIO()
    Console(file=written, width=120, no_color=True).print(table(checks))
    return written.getvalue()
