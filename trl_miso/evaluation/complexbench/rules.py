"""The rules of ComplexBench: what a program checks of the part of a response that a question is about.

A rule is `NAME:ARGUMENT`, four pairs of them a line each. Its verdicts are those of the benchmark's published checker, its habits
included: some kinds read ASCII punctuation as full-width and some do not, some also hold if they do without the quotation marks
around the text. One thing differs: kinds are told by their names, where the published checker looks for names anywhere in a rule, also
in what it asks for.
"""

import json
import string
from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Spans = Sequence[str]
Holds = Callable[[Any], bool]

_WIDE = str.maketrans("!#$%&()*,.:;?\\^“”", '！＃＄％＆（）＊，。：；？＼＾""')


@dataclass(frozen=True)
class Rule:
    """A rule of the benchmark, ready to be asked.

    Attributes:
        text: As the benchmark has it.
        each: It is of several parts of a response, each by itself or their number.
        holds: From the parts of a response (none if it has none) to the verdict.
    """

    text: str
    each: bool
    holds: Callable[[Spans], bool]


def parse_rule(text: str) -> Rule:
    """The rule that `text` states.

    Raises:
        ValueError: If it is not one of the benchmark's kinds, or its argument is not of that kind.
    """
    stated = text.lstrip().removesuffix("\n")
    for (first, second), (one, other) in _PAIRS.items():
        beginning, separator, end = stated.partition(f"\n{second}:")
        if separator and beginning.startswith(f"{first}:"):
            both = _condition(text, one, beginning.removeprefix(f"{first}:")), _condition(text, other, end)
            return _rule(text, first, _all(both))
    names = [line.partition(":")[0] for line in stated.split("\n") if ":" in line]
    if len(_KINDS.keys() & names) != 1 or names[0] not in _KINDS:
        pairs = [" with ".join(pair) for pair in _PAIRS]
        raise ValueError(
            f"Got rule {text!r}, expected NAME:ARGUMENT with one of {sorted(_KINDS)}, or {', '.join(pairs)}. Fix: correct the rule; "
            "nothing was asked yet."
        )
    name, _, argument = stated.partition(":")
    return _rule(text, name, _condition(text, _KINDS[name].condition, argument))


def _rule(text: str, name: str, holds: Holds) -> Rule:
    kind = _KINDS[name]

    def verdict(spans: Spans) -> bool:
        return kind.missing if not any(spans[:1]) and len(spans) < 2 else kind.scope(kind, holds, spans)

    return Rule(text, name.endswith("_each"), verdict)


def _condition(text: str, make: Callable[[str], Holds], argument: str) -> Holds:
    try:
        return make(argument)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(
            f"Got rule {text!r}, whose argument cannot be read ({error}), expected one of its kind, as [1,100] or [word,word]. Fix: "
            "correct the rule; nothing was asked yet."
        ) from error


# Arguments: what a text has to be


def _items(argument: str) -> list[str]:
    stated = argument.strip()
    if not (stated.startswith("[") and stated.endswith("]")) or "\n" in stated:
        raise ValueError("no list in brackets, in one line")
    return stated.strip("[]").split(",")


def _all(conditions: Sequence[Holds]) -> Holds:
    return lambda text: all(holds(text) for holds in conditions)


def _words(argument: str) -> list[str]:
    return [word.strip() for word in _items(argument)]


def _bounds(least: Any, most: Any) -> Callable[[int], bool]:
    if not all(isinstance(bound, int | float) for bound in (least, most)):
        raise ValueError("no two numbers")
    return lambda count: least <= count <= most


def _range(argument: str) -> Callable[[int], bool]:
    least, most = literal_eval(argument.strip())
    return _bounds(least, most)


def _contains(argument: str) -> Holds:
    words = [_wide(word) for word in _words(argument)]
    return lambda text: all(word in text for word in words)


def _lacks(argument: str, words: Callable[[str], list[str]] = _words) -> Holds:
    forbidden = [_wide(word) for word in words(argument)]
    return lambda text: not any(word in text for word in forbidden)


def _counts(argument: str, words: Callable[[str], list[str]] = _words) -> Holds:
    least, most, *wanted = words(argument)
    fits, wanted = _bounds(int(least), int(most)), [_wide(word) for word in wanted]
    return lambda text: fits(sum(word in text for word in wanted))


def _characters(argument: str) -> Holds:
    fits = _range(argument)
    return lambda text: fits(len(text))


def _word_count(argument: str) -> Holds:
    fits = _range(argument)
    return lambda text: fits(len(text.split()))


def _starts(argument: str) -> Holds:
    return lambda text: text.startswith(_wide(argument))


def _ends(argument: str) -> Holds:
    return lambda text: text.endswith(tuple(_wide(argument) + mark for mark in ("", "。", "？")))


def _equals(argument: str) -> Holds:
    return lambda text: text in (argument, argument + "。", argument + ".")


def _punctuation(argument: str) -> Holds:
    """No other punctuation than the listed, of ASCII's: full-width where it has a full-width form."""
    other = set(_wide(string.punctuation)) - {_wide(mark) for mark in _words(argument)}
    return lambda text: other.isdisjoint(text)


def _json_object(argument: str) -> Holds:
    """The first object in braces has these keys and no others; any keys if none is listed."""
    keys = [key for key in literal_eval(argument.strip()) if key != ""]

    def holds(text: str) -> bool:
        try:
            found = json.loads(_first_braces(text))
        except (ValueError, RecursionError):
            return False
        return not keys or (len(found) == len(keys) and all(key in found for key in keys))

    return holds


def _first_braces(text: str) -> str:
    """From the first brace to the one that closes it, as if no brace were in a string."""
    depth = start = 0
    for at, character in enumerate(text):
        if character == "{":
            start = start if depth else at
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start : at + 1]
    return ""


def _number(argument: str) -> Holds:
    fits = _range(argument)
    return lambda spans: fits(len(spans))


def _starts_in_turn(argument: str) -> Holds:
    starts = [_wide(start) for start in _words(argument)]
    return lambda spans: (
        len(spans) == len(starts)
        and all(_wide(span).startswith(start) for span, start in zip(spans, starts, strict=True) if span)
    )


def _not(make: Callable[[str], Holds]) -> Callable[[str], Holds]:
    def condition(argument: str) -> Holds:
        holds = make(argument)
        return lambda text: not holds(text)

    return condition


# Readings of a part: one of them has to hold


def _wide(text: str) -> str:
    return text.translate(_WIDE)


def _unquoted(text: str) -> str:
    text = text.lstrip("\n")
    return text[1:-1] if text[:1] in ('"', "“", "`") and text[-1] in ('"', "”", "`") else text


def _as_it_is(text: str) -> list[str]:
    return [text]


def _widened(text: str) -> list[str]:
    return [_wide(text)]


def _bare(text: str) -> list[str]:
    return [_unquoted(text)]


def _or_bare(text: str) -> list[str]:
    return [text, _unquoted(text)]


def _widened_or_bare(text: str) -> list[str]:
    return _or_bare(_wide(text))


def _bare_or_widened(text: str) -> list[str]:
    return [_wide(reading) for reading in _or_bare(text)]


# Scopes: which parts


def _first(kind: "_Kind", holds: Holds, spans: Spans) -> bool:
    return any(holds(reading) for reading in kind.readings(spans[0]))


def _plain(kind: "_Kind", holds: Holds, spans: Spans) -> bool:
    """Of the first part; one that is empty, or has "None" in it, is taken for none."""
    return any(
        kind.missing if not reading or "None" in reading else holds(reading) for reading in kind.readings(spans[0])
    )


def _every(kind: "_Kind", holds: Holds, spans: Spans) -> bool:
    return all(any(holds(reading) for reading in kind.readings(span)) for span in spans if span)


def _every_but_last(kind: "_Kind", holds: Holds, spans: Spans) -> bool:
    return _every(kind, holds, spans[:-1] or spans)


def _together(kind: "_Kind", holds: Holds, spans: Spans) -> bool:
    return holds(spans)


@dataclass(frozen=True)
class _Kind:
    """From a rule's argument and the parts of a response to the verdict; `missing` is the verdict where there is no part."""

    condition: Callable[[str], Holds]
    readings: Callable[[str], list[str]]
    scope: Callable[["_Kind", Holds, Spans], bool]
    missing: bool = False


_KINDS = {
    "keyword": _Kind(_contains, _bare_or_widened, _plain),
    "forbidden_word": _Kind(_lacks, _bare_or_widened, _plain, missing=True),
    "match": _Kind(_equals, _bare_or_widened, _plain),
    "constraint_punc": _Kind(_punctuation, _bare_or_widened, _plain),
    "startswith": _Kind(_starts, _bare_or_widened, _plain),
    "endswith": _Kind(_ends, _bare_or_widened, _plain),
    "not endswith": _Kind(_not(_ends), _bare_or_widened, _plain, missing=True),
    "length": _Kind(_characters, _bare_or_widened, _plain),
    "length_word": _Kind(_word_count, _bare_or_widened, _plain),
    "Json": _Kind(_json_object, _or_bare, _plain),
    "model_keyword": _Kind(_contains, _as_it_is, _first),
    "model_keyword_each": _Kind(_contains, _widened, _every),
    "model_keyword_num": _Kind(_counts, _as_it_is, _first),
    "model_keyword_num_each": _Kind(lambda argument: _counts(argument, _items), _as_it_is, _every),
    "model_forbidden_word": _Kind(_lacks, _as_it_is, _first, missing=True),
    "model_forbidden_word_each": _Kind(_lacks, _widened, _every, missing=True),
    "model_number_each": _Kind(_number, _as_it_is, _together),
    "model_length": _Kind(_characters, _or_bare, _first),
    "model_length_each": _Kind(_characters, _or_bare, _every),
    "model_length_word": _Kind(_word_count, _or_bare, _first),
    "model_length_word_each": _Kind(_word_count, _or_bare, _every),
    "model_startswith": _Kind(_starts, _widened, _first),
    "model_startswith_each": _Kind(_starts, _widened, _every),
    "model_starts_with_list_each": _Kind(_starts_in_turn, _as_it_is, _together),
    "model_not_startswith": _Kind(_not(_starts), _widened, _first, missing=True),
    "model_endswith": _Kind(_ends, _widened, _first),
    "model_endswith_each": _Kind(_ends, _widened_or_bare, _every_but_last),
    "model_not_endswith": _Kind(_not(_ends), _widened, _first, missing=True),
    "model_not_endswith_each": _Kind(_not(_ends), _widened, _every, missing=True),
    "model_constraint_punc": _Kind(_punctuation, _bare, _first),
    "model_constraint_punc_each": _Kind(_punctuation, _widened_or_bare, _every),
}
# Both conditions, of one reading of the same parts.
_PAIRS: dict[tuple[str, str], tuple[Callable[[str], Holds], Callable[[str], Holds]]] = {
    ("keyword", "forbidden_word"): (_contains, _lacks),
    ("startswith", "endswith"): (_starts, _ends),
    ("model_startswith", "model_endswith"): (_starts, _ends),
    ("model_keyword_num_each", "model_forbidden_word_each"): (
        lambda argument: _counts(argument, _items),
        lambda argument: _lacks(argument, _items),
    ),
}
