"""Rules of ComplexBench: what a program checks in the part of a response that a question is about.

A rule is `NAME:ARGUMENT`; four rules are a pair of these, one per line. The verdicts equal those of the benchmark's published checker,
including its quirks: some kinds of rule read ASCII punctuation as full-width and some do not; some also pass if the text passes
without the quotation marks around it. One difference: here a rule's kind is decided by its name, while the published checker searches
for names anywhere in a rule, also in its argument.

Every kind of rule (`KINDS`) chooses three things: a condition, which the argument states; the readings of a part, one of which has to
meet the condition; and the scope, that is, which parts are checked.
"""

import json
import string
from ast import literal_eval
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Spans = Sequence[str]
Condition = Callable[[Any], bool]

_WIDE = str.maketrans("!#$%&()*,.:;?\\^“”", '！＃＄％＆（）＊，。：；？＼＾""')


@dataclass(frozen=True)
class Rule:
    """A parsed rule of the benchmark.

    Attributes:
        text: The rule as the benchmark writes it.
        each: Whether the rule is about several parts of a response: each of them, or their number.
        holds: Function of the parts of a response (an empty list if the response has no such part): whether the rule is met.
    """

    text: str
    each: bool
    holds: Callable[[Spans], bool]


def parse_rule(text: str) -> Rule:
    """Parse a rule of the benchmark.

    Raises:
        ValueError: If the rule is not one of the benchmark's kinds, or its argument cannot be read.
    """
    stated = text.lstrip().removesuffix("\n")
    for (first_name, second_name), (parse_first, parse_second) in _PAIRS.items():
        first, separator, second_argument = stated.partition(f"\n{second_name}:")
        if separator and first.startswith(f"{first_name}:"):
            first_condition = _parse_argument(text, parse_first, first.removeprefix(f"{first_name}:"))
            second_condition = _parse_argument(text, parse_second, second_argument)
            return _rule(text, first_name, _both(first_condition, second_condition))
    names = [line.partition(":")[0] for line in stated.split("\n") if ":" in line]
    if len(KINDS.keys() & names) != 1 or names[0] not in KINDS:
        pairs = [" with ".join(pair) for pair in _PAIRS]
        raise ValueError(
            f"Got rule {text!r}, expected NAME:ARGUMENT with one of {sorted(KINDS)}, or {', '.join(pairs)}. Fix: correct the rule; the "
            "judge has not been asked yet."
        )
    name, _, argument = stated.partition(":")
    return _rule(text, name, _parse_argument(text, KINDS[name].parse, argument))


def _rule(text: str, name: str, condition: Condition) -> Rule:
    kind = KINDS[name]

    def holds(spans: Spans) -> bool:
        no_part = len(spans) == 0 or (len(spans) == 1 and not spans[0])
        if no_part:
            return kind.if_no_part
        return kind.scope(kind, condition, spans)

    return Rule(text, name.endswith("_each"), holds)


def _parse_argument(text: str, parse: Callable[[str], Condition], argument: str) -> Condition:
    try:
        return parse(argument)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(
            f"Got rule {text!r}, whose argument cannot be read ({error}), expected an argument of its kind, such as [1,100] or "
            "[word,word]. Fix: correct the rule; the judge has not been asked yet."
        ) from error


# Conditions: what a text has to meet, parsed from a rule's argument


def _items(argument: str) -> list[str]:
    stated = argument.strip()
    if not (stated.startswith("[") and stated.endswith("]")) or "\n" in stated:
        raise ValueError("expected a list in brackets, on one line")
    return stated.strip("[]").split(",")


def _words(argument: str) -> list[str]:
    return [word.strip() for word in _items(argument)]


def _both(first: Condition, second: Condition) -> Condition:
    return lambda text: first(text) and second(text)


def _not(parse: Callable[[str], Condition]) -> Callable[[str], Condition]:
    def parse_negated(argument: str) -> Condition:
        condition = parse(argument)
        return lambda text: not condition(text)

    return parse_negated


def _between(least: Any, most: Any) -> Callable[[int], bool]:
    if not all(isinstance(bound, int | float) for bound in (least, most)):
        raise ValueError("expected two numbers")
    return lambda count: least <= count <= most


def _range(argument: str) -> Callable[[int], bool]:
    least, most = literal_eval(argument.strip())
    return _between(least, most)


def _contains_all(argument: str) -> Condition:
    words = [_wide(word) for word in _words(argument)]
    return lambda text: all(word in text for word in words)


def _contains_none(argument: str, split: Callable[[str], list[str]] = _words) -> Condition:
    words = [_wide(word) for word in split(argument)]
    return lambda text: not any(word in text for word in words)


def _contains_number_of(argument: str, split: Callable[[str], list[str]] = _words) -> Condition:
    least, most, *listed = split(argument)
    in_range = _between(int(least), int(most))
    words = [_wide(word) for word in listed]
    return lambda text: in_range(sum(word in text for word in words))


def _character_count(argument: str) -> Condition:
    in_range = _range(argument)
    return lambda text: in_range(len(text))


def _word_count(argument: str) -> Condition:
    in_range = _range(argument)
    return lambda text: in_range(len(text.split()))


def _starts_with(argument: str) -> Condition:
    return lambda text: text.startswith(_wide(argument))


def _ends_with(argument: str) -> Condition:
    endings = tuple(_wide(argument) + mark for mark in ("", "。", "？"))
    return lambda text: text.endswith(endings)


def _equals(argument: str) -> Condition:
    return lambda text: text in (argument, argument + "。", argument + ".")


def _punctuation(argument: str) -> Condition:
    """Allow only the listed punctuation of ASCII's, compared in its full-width form where there is one."""
    forbidden = set(_wide(string.punctuation)) - {_wide(mark) for mark in _words(argument)}
    return lambda text: forbidden.isdisjoint(text)


def _json_object(argument: str) -> Condition:
    """Require that the first object in braces has exactly the listed keys; any keys if none is listed."""
    keys = [key for key in literal_eval(argument.strip()) if key != ""]

    def condition(text: str) -> bool:
        try:
            parsed = json.loads(_first_braces(text))
        except (ValueError, RecursionError):
            return False
        return not keys or (len(parsed) == len(keys) and all(key in parsed for key in keys))

    return condition


def _first_braces(text: str) -> str:
    """Return the text from the first brace to its closing brace. Braces within strings count too, as in the published checker."""
    depth = start = 0
    for index, character in enumerate(text):
        if character == "{":
            if depth == 0:
                start = index
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start : index + 1]
    return ""


def _span_count(argument: str) -> Condition:
    in_range = _range(argument)
    return lambda spans: in_range(len(spans))


def _spans_start_with(argument: str) -> Condition:
    """Require one span per listed start, in this order; an empty span passes."""
    starts = [_wide(start) for start in _words(argument)]

    def condition(spans: Spans) -> bool:
        if len(spans) != len(starts):
            return False
        return all(_wide(span).startswith(start) for span, start in zip(spans, starts, strict=True) if span)

    return condition


# Readings of a part: one of them has to meet the condition


def _wide(text: str) -> str:
    return text.translate(_WIDE)


def _unquoted(text: str) -> str:
    text = text.lstrip("\n")
    if text[:1] in ('"', "“", "`") and text[-1] in ('"', "”", "`"):
        return text[1:-1]
    return text


def _read_unchanged(text: str) -> list[str]:
    return [text]


def _read_wide(text: str) -> list[str]:
    return [_wide(text)]


def _read_unquoted(text: str) -> list[str]:
    return [_unquoted(text)]


def _read_with_and_without_quotes(text: str) -> list[str]:
    return [text, _unquoted(text)]


def _read_wide_then_unquoted(text: str) -> list[str]:
    return _read_with_and_without_quotes(_wide(text))


def _read_unquoted_then_wide(text: str) -> list[str]:
    return [_wide(reading) for reading in _read_with_and_without_quotes(text)]


# Scopes: which parts are checked


def _meets(kind: "_Kind", condition: Condition, part: str) -> bool:
    return any(condition(reading) for reading in kind.readings(part))


def _first_part(kind: "_Kind", condition: Condition, spans: Spans) -> bool:
    return _meets(kind, condition, spans[0])


def _first_part_unless_none(kind: "_Kind", condition: Condition, spans: Spans) -> bool:
    """Check the first part. A reading that is empty or contains "None" counts as no part."""
    for reading in kind.readings(spans[0]):
        no_part = not reading or "None" in reading
        passes = kind.if_no_part if no_part else condition(reading)
        if passes:
            return True
    return False


def _every_part(kind: "_Kind", condition: Condition, spans: Spans) -> bool:
    return all(_meets(kind, condition, span) for span in spans if span)


def _every_part_but_last(kind: "_Kind", condition: Condition, spans: Spans) -> bool:
    """Check every part but the last; a part that is the only one is checked."""
    return _every_part(kind, condition, spans[:-1] or spans)


def _all_parts_together(kind: "_Kind", condition: Condition, spans: Spans) -> bool:
    return condition(spans)


@dataclass(frozen=True)
class _Kind:
    """A kind of rule: how its argument is parsed, how a part is read, and which parts are checked.

    Attributes:
        if_no_part: The verdict on a response without such a part.
    """

    parse: Callable[[str], Condition]
    readings: Callable[[str], list[str]]
    scope: Callable[["_Kind", Condition, Spans], bool]
    if_no_part: bool = False


KINDS = {
    "keyword": _Kind(_contains_all, _read_unquoted_then_wide, _first_part_unless_none),
    "forbidden_word": _Kind(_contains_none, _read_unquoted_then_wide, _first_part_unless_none, if_no_part=True),
    "match": _Kind(_equals, _read_unquoted_then_wide, _first_part_unless_none),
    "constraint_punc": _Kind(_punctuation, _read_unquoted_then_wide, _first_part_unless_none),
    "startswith": _Kind(_starts_with, _read_unquoted_then_wide, _first_part_unless_none),
    "endswith": _Kind(_ends_with, _read_unquoted_then_wide, _first_part_unless_none),
    "not endswith": _Kind(_not(_ends_with), _read_unquoted_then_wide, _first_part_unless_none, if_no_part=True),
    "length": _Kind(_character_count, _read_unquoted_then_wide, _first_part_unless_none),
    "length_word": _Kind(_word_count, _read_unquoted_then_wide, _first_part_unless_none),
    "Json": _Kind(_json_object, _read_with_and_without_quotes, _first_part_unless_none),
    "model_keyword": _Kind(_contains_all, _read_unchanged, _first_part),
    "model_keyword_each": _Kind(_contains_all, _read_wide, _every_part),
    "model_keyword_num": _Kind(_contains_number_of, _read_unchanged, _first_part),
    "model_keyword_num_each": _Kind(
        lambda argument: _contains_number_of(argument, _items), _read_unchanged, _every_part
    ),
    "model_forbidden_word": _Kind(_contains_none, _read_unchanged, _first_part, if_no_part=True),
    "model_forbidden_word_each": _Kind(_contains_none, _read_wide, _every_part, if_no_part=True),
    "model_number_each": _Kind(_span_count, _read_unchanged, _all_parts_together),
    "model_length": _Kind(_character_count, _read_with_and_without_quotes, _first_part),
    "model_length_each": _Kind(_character_count, _read_with_and_without_quotes, _every_part),
    "model_length_word": _Kind(_word_count, _read_with_and_without_quotes, _first_part),
    "model_length_word_each": _Kind(_word_count, _read_with_and_without_quotes, _every_part),
    "model_startswith": _Kind(_starts_with, _read_wide, _first_part),
    "model_startswith_each": _Kind(_starts_with, _read_wide, _every_part),
    "model_starts_with_list_each": _Kind(_spans_start_with, _read_unchanged, _all_parts_together),
    "model_not_startswith": _Kind(_not(_starts_with), _read_wide, _first_part, if_no_part=True),
    "model_endswith": _Kind(_ends_with, _read_wide, _first_part),
    "model_endswith_each": _Kind(_ends_with, _read_wide_then_unquoted, _every_part_but_last),
    "model_not_endswith": _Kind(_not(_ends_with), _read_wide, _first_part, if_no_part=True),
    "model_not_endswith_each": _Kind(_not(_ends_with), _read_wide, _every_part, if_no_part=True),
    "model_constraint_punc": _Kind(_punctuation, _read_unquoted, _first_part),
    "model_constraint_punc_each": _Kind(_punctuation, _read_wide_then_unquoted, _every_part),
}
# Pairs of rules: one reading of the part has to meet both conditions. The first name decides readings and scope.
_PAIRS: dict[tuple[str, str], tuple[Callable[[str], Condition], Callable[[str], Condition]]] = {
    ("keyword", "forbidden_word"): (_contains_all, _contains_none),
    ("startswith", "endswith"): (_starts_with, _ends_with),
    ("model_startswith", "model_endswith"): (_starts_with, _ends_with),
    ("model_keyword_num_each", "model_forbidden_word_each"): (
        lambda argument: _contains_number_of(argument, _items),
        lambda argument: _contains_none(argument, _items),
    ),
}
