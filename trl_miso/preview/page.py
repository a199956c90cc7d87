"""The preview as one HTML page that needs nothing else: no server, no network, no other file."""

import json
from importlib.resources import files
from typing import Any

_MARK = "__PREVIEW__"


def render_page(preview: dict[str, Any]) -> str:
    """The page that shows a preview's statistics and rows.

    Args:
        preview: What `print_preview` takes, plain JSON values.

    Raises:
        ValueError: If a number is not finite, which JSON cannot hold.
    """
    # Within a script element only "<" can end the data or begin a comment. In ASCII, JSON has no line separators that are
    # line ends to some readers, and half a surrogate pair, which no file can hold, stays what it was.
    data = json.dumps(preview, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    before, after = template.split(_MARK)
    return before + data + after
