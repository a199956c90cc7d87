"""The report as one HTML page that needs nothing else: no server, no network, no other file.

Its style, and how it shows tokens, are those of the preview's page.
"""

import base64
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

_MARKS = ("/* __STYLE__ */", "/* __SHARED__ */", "__REPORT__")
_SHARED = ("el", "num", "count", "percent", "table", "UNSEEN", "glyphs", "repr", "place", "focusToken", "listen")


def render_page(report: dict[str, Any], figures: Sequence[dict[str, str]], folder: Path) -> str:
    """The page that shows a report, with its figures, which are files in `folder`.

    Raises:
        ValueError: If a number is not finite, which JSON cannot hold.
    """
    drawn = [figure | {"data": base64.b64encode((folder / figure["file"]).read_bytes()).decode()} for figure in figures]
    # As in the preview: "<" alone could end the data, and in ASCII nothing of it is a line separator or half a character.
    data = json.dumps(
        {"report": _told(report), "figures": drawn}, ensure_ascii=True, allow_nan=False, separators=(",", ":")
    )
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    preview = files("trl_miso.preview").joinpath("page.html").read_text(encoding="utf-8")
    style = preview.split("<style>")[1].split("</style>")[0]
    shared = "\n".join(_declaration(preview, name) for name in _SHARED)
    for mark, text in zip(_MARKS, (style, shared, data.replace("<", "\\u003c")), strict=True):
        before, after = template.split(mark)
        template = before + text + after
    return template


def _told(report: dict[str, Any]) -> dict[str, Any]:
    """What the page shows: of the rows only the one in full."""
    row = report["shown"]["row"]
    models = [
        {key: value for key, value in model.items() if key != "layers"}
        | {"rows": [r for r in model["rows"] if r["row"] == row]}
        for model in report["models"]
    ]
    return report | {"models": models}


def _declaration(script: str, name: str) -> str:
    """A declaration at the script's top level: from its line to the one with which it ends, both unindented."""
    found = re.search(rf"^(?:const|function) {name}\b.*\n(?:(?:[ \t].*)?\n)*(?:[}}\])].*\n)?", script, re.MULTILINE)
    assert found, f"the preview's page declares no {name}"
    return found[0]
