"""A page as one HTML file that needs no server, no network and no other file."""

import json
from importlib.resources import files
from typing import Any


def render_page(name: str, data: dict[str, Any]) -> str:
    """Fill `page.html` with the styles and scripts that all pages share, those of one page, and the data to show.

    Args:
        name: `"preview"` or `"report"`: the page whose `.css` and `.js` follow the common ones.
        data: Plain JSON values, which the page's script reads.

    Raises:
        ValueError: If a number is not finite, which JSON cannot hold.
    """
    # Within a script element only "<" can end the data or begin a comment. ASCII keeps the line separators that some readers
    # take for line ends, and half a surrogate pair, which no file can hold.
    embedded = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    marks = [
        ("__NAME__", name),
        ("/* __STYLE__ */\n", _read("common.css") + _read(f"{name}.css")),
        ("__NAME__", name),
        ("__DATA__", embedded),
        ("/* __SCRIPT__ */\n", _read("common.js") + _read(f"{name}.js")),
    ]
    # One mark after the other, in the order of the template: a mark within the data stays text.
    page, rest = "", _read("page.html")
    for mark, text in marks:
        before, rest = rest.split(mark, 1)
        page += before + text
    return page + rest


def _read(file: str) -> str:
    return files(__package__).joinpath(file).read_text(encoding="utf-8")
