"""The checks as a table."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from trl_miso.verification.checks import Check

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "dim"}


def table(checks: Sequence[Check]) -> Table:
    """One line a check: what was measured, what rounding explains."""
    made = Table(title="MISO on this model, tokenizer and rows")
    made.add_column("check", no_wrap=True)
    made.add_column("")
    made.add_column("measured", justify="right")
    made.add_column("at most", justify="right")
    made.add_column("")
    for check in checks:
        numbers = ("" if x is None else f"{x:.2g}" for x in (check.measured, check.budget))
        made.add_row(check.name, check.status, *numbers, check.note, style=_STYLES[check.status])
    return made


def as_text(checks: Sequence[Check]) -> str:
    written = io.StringIO()
    Console(file=written, width=120, no_color=True).print(table(checks))
    return written.getvalue()
