"""The report's page, its figures embedded."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_miso.pages.page import render_page


def render_report(report: dict[str, Any], figures: Sequence[dict[str, str]], folder: Path) -> str:
    """Render the page of a report.

    Args:
        report: What `trl_miso.report.build.build_report` returns.
        figures: What `trl_miso.report.plots.draw` returns.
        folder: The folder with the figures' files.

    Raises:
        ValueError: If a number is not finite, which JSON cannot hold.
    """
    images = []
    for figure in figures:
        data = base64.b64encode((folder / figure["file"]).read_bytes()).decode()
        images.append(figure | {"data": data})
    return render_page("report", {"report": _without_unused(report), "figures": images})


def _without_unused(report: dict[str, Any]) -> dict[str, Any]:
    """The report without what the page does not show: masses per head, and all rows but the one in full."""
    index = report["shown"]["row"]
    models = []
    for model in report["models"]:
        kept = {key: value for key, value in model.items() if key != "layers"}
        kept["rows"] = [row for row in model["rows"] if row["row"] == index]
        models.append(kept)
    return report | {"models": models}
