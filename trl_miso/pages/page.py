"""The preview as one HTML page that needs nothing else: no server, no network, no other file."""

import json
from importlib.resources import files
from typing import Any


def render_page(preview: dict[str, Any]) -> str:
    """The page that shows a preview's statistics and rows.

    Args:
        preview: What `print_preview` takes, plain JSON values.

    Raises:
        ValueError: If a number is not finite, which JSON cannot hold.
    """
    return fill_page(files(__package__).joinpath("preview.html").read_text(encoding="utf-8"), preview)


def fill_page(template: str, data: dict[str, Any]) -> str:
    """A page's template with the style and the script that all pages have, and its data.

    Raises:
        ValueError: If a number is not finite.
    """
    common = files(__package__)
    # Within a script element only "<" can end the data or begin a comment. In ASCII, JSON has no line separators that are
    # line ends to some readers, and half a surrogate pair, which no file can hold, stays what it was.
    told = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "/* __STYLE__ */\n": common.joinpath("common.css").read_text(encoding="utf-8"),
        "__DATA__": told,
        "/* __SCRIPT__ */\n": common.joinpath("common.js").read_text(encoding="utf-8"),
    }
    page = ""
    for mark, text in parts.items():  # in the order in which they stand, so that no mark within the data is one
        before, template = template.split(mark, 1)
        page += before + text
    return page + template
