"""The report as one HTML page that needs nothing else: no server, no network, no other file.

Its style, and how it shows tokens, are those of the preview's page.
"""

import base64
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from trl_miso.pages.page import fill_page


def render_page(report: dict[str, Any], figures: Sequence[dict[str, str]], folder: Path) -> str:
    """The page that shows a report, with its figures, which are files in `folder`.

    Raises:
        ValueError: If a number is not finite, which JSON cannot hold.
    """
    drawn = [figure | {"data": base64.b64encode((folder / figure["file"]).read_bytes()).decode()} for figure in figures]
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return fill_page(template, {"report": _told(report), "figures": drawn})


def _told(report: dict[str, Any]) -> dict[str, Any]:
    """What the page shows: of the rows only the one in full."""
    row = report["shown"]["row"]
    models = [
        {key: value for key, value in model.items() if key != "layers"}
        | {"rows": [r for r in model["rows"] if r["row"] == row]}
        for model in report["models"]
    ]
    return report | {"models": models}
