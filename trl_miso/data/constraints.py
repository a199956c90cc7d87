"""Constraints in the text of an instruction: where they stand, the text without them, and with them (paper, section 5.1).

A constraint can be taken out of a text where it stands verbatim, once, as whole lines or whole sentences. A list marker in
front of it and the punctuation behind it go with it. Nothing else of the text does: a line that announces a list stays.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

WITHIN = "a constraint stands within a sentence of its prompt"
REPEATED = "a constraint stands in its prompt more than once"
NOTHING_ELSE = "the prompt has nothing but constraints"

_MARKER = r"(?:[-#*>\u2022]|\(?\d+[.)])[ \t]+"
_AT_LINE_START = re.compile(rf"[ \t]*(?:{_MARKER})?")
_AFTER_SENTENCE = re.compile(rf"(?:[.!?\u2026][\"')\]\u201d\u2019]*\s+|[\u3002\uff01\uff1f])(?P<marker>{_MARKER})?$")
_CLOSED = re.compile(r"[.!?\u2026\u3002\uff01\uff1f][\"')\]\u201d\u2019]*$")
_CLOSING = re.compile(r"[.!?;,\uff1b]?[ \t\r]*$|[.!?](?=\s)|[\u3002\uff01\uff1f\uff1b]")
_IDENTIFIER = re.compile(r"[a-z][a-z_ ]*:[a-z][a-z_ ]*")  # "length_constraints:number_words"
_UNSPACED = "\u2e80"  # from here on scripts that write no spaces between words (Chinese, Japanese)


class Split(NamedTuple):
    """A text without the constraints that it holds, the constraints that it lacks, and why it cannot be split (or "")."""

    bare: str
    missing: list[str]
    obstacle: str


def split_text(text: str, constraints: Sequence[str]) -> Split:
    """Take out of a text the constraints that stand in it.

    >>> split_text("Write a poem. Use no commas. Be short.", ["Be short.", "Use no commas.", "Rhyme."])
    Split(bare='Write a poem.', missing=['Rhyme.'], obstacle='')
    """
    spans: list[tuple[int, int]] = []
    missing, obstacle = set(), ""
    # Longest first: a constraint within a longer one is taken out with it.
    for constraint in sorted({constraint.strip() for constraint in constraints}, key=len, reverse=True):
        places = _places(text, constraint)
        free = [i for i in places if not any(start <= i and i + len(constraint) <= end for start, end in spans)]
        if not places:
            missing.add(constraint)
        elif len(free) > 1:
            obstacle = REPEATED
        elif free:
            span = _whole(text, free[0], free[0] + len(constraint))
            if span is None or any(span[0] < end and start < span[1] for start, end in spans):
                obstacle = WITHIN
            else:
                spans.append(span)
    bare = _cut(text, sorted(spans)) if spans else text
    if not obstacle and not bare.strip():
        obstacle = NOTHING_ELSE
    return Split(bare, [constraint for constraint in constraints if constraint.strip() in missing], obstacle)


def add_constraints(text: str, constraints: Sequence[str]) -> str:
    """A text followed by constraints, as Crab writes most of its rows."""
    return f"{text}\n\n" + "\n".join(constraints) if constraints else text


def is_identifier(constraint: str) -> bool:
    """Whether a constraint is the name of a check, such as `detectable_format:number_bullets`, and no text."""
    return bool(_IDENTIFIER.fullmatch(constraint.strip()))


def _places(text: str, part: str) -> list[int]:
    """Where `part` stands in `text`, not as a piece of longer words."""
    places, start = [], text.find(part)
    while start >= 0:
        end = start + len(part)
        in_word_before = start > 0 and _joins(text[start - 1]) and _joins(text[start])
        in_word_after = end < len(text) and _joins(text[end - 1]) and _joins(text[end])
        if not (in_word_before or in_word_after):
            places.append(start)
        start = text.find(part, start + 1)
    return places


def _joins(character: str) -> bool:
    return character.isalnum() and character < _UNSPACED


def _whole(text: str, start: int, end: int) -> tuple[int, int] | None:
    """The span of `text[start:end]` with its marker and punctuation if it is whole lines or sentences; else None."""
    line_start, line_end = text.rfind("\n", 0, start) + 1, text.find("\n", end)
    before, after = text[line_start:start], text[end : line_end if line_end >= 0 else len(text)]
    if _CLOSED.search(text[start:end]):
        if after and not after[0].isspace() and text[end - 1] < _UNSPACED:
            return None
    elif closing := _CLOSING.match(after):
        end += closing.end()
    else:
        return None
    if _AT_LINE_START.fullmatch(before):
        return line_start, end
    if sentence := _AFTER_SENTENCE.search(before):
        return start - len(sentence["marker"] or ""), end
    return None


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """`text` without `spans`. Of the white space around a span one side remains: the one with more line breaks."""
    kept = ""
    bounds = [0, *(bound for span in spans for bound in span), len(text)]
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        piece = text[start:end]
        left, right = kept.rstrip(), piece.lstrip()
        before, after = kept[len(left) :], piece[: len(piece) - len(right)]
        gap = after
        if before.count("\n") > after.count("\n"):  # the next line keeps its indentation
            gap = before[: before.rfind("\n") + 1] + after[after.rfind("\n") + 1 :]
        kept = f"{left}{gap}{right}" if left or not start else right
    return kept.rstrip() if spans[-1][1] == len(text.rstrip()) else kept
