"""Constraints that an answer satisfies, found with lm-eval's own checkers (IFEval's), as Crab back-translates them from answers.

An answer may first be restyled (lowercase, a title, no commas, ...): a model's plain answers satisfy few of these constraints.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from trl_miso.evaluation.ifeval import load_checkers

# Words that an instruction may forbid: frequent in answers, and rarely needed.
_COMMON = [
    "very",
    "really",
    "important",
    "great",
    "however",
    "also",
    "many",
    "often",
    "because",
    "different",
    "various",
    "while",
    "such",
    "provide",
    "ensure",
    "help",
    "create",
    "best",
    "good",
    "essential",
    "overall",
    "finally",
    "additionally",
    "several",
    "unique",
    "simple",
    "make",
]
_WORD = re.compile(r"[A-Za-z]+")


class Constraint(NamedTuple):
    """An IFEval instruction: its name, its keyword arguments, and lm-eval's description of it."""

    name: str
    kwargs: dict[str, Any]
    text: str


def restyle(answer: str, rng: random.Random) -> tuple[str, str | None]:
    """The answer, half of the time in another form, and the name of the instruction that asks for this form."""
    if rng.random() < 0.5:
        return answer, None
    name = rng.choice(sorted(_STYLES))
    return _STYLES[name](answer), name


def back_translate(answer: str, count: int, style: str | None, rng: random.Random) -> list[Constraint] | None:
    """`count` constraints that the answer satisfies, no two of a kind or in conflict; None if there are fewer.

    The constraint of the answer's style is among them. Everything is drawn from `rng`.
    """
    checkers, _ = load_checkers()
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_CONFLICTS

    found: list[Constraint] = []
    names = sorted(_PROPOSALS, key=lambda name: (name != style, rng.random()))
    for name in names:
        if any(name in INSTRUCTION_CONFLICTS[other.name] for other in found):
            continue
        kwargs = _PROPOSALS[name](answer, rng)
        if kwargs is None:
            continue
        checker = checkers[name](name)
        text = checker.build_description(**kwargs)
        if checker.check_following(answer):
            found.append(Constraint(name, kwargs, text))
        if len(found) == count:
            return sorted(found, key=lambda _: rng.random())
    return None


def _starred(answer: str) -> str:
    return "\n\n***\n\n".join(re.split(r"\n\s*\n", answer.strip()))


def _bulleted(answer: str) -> str:
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(answer.split()))
    return "\n".join(f"* {sentence}" for sentence in sentences)


def _with_title(answer: str) -> str:
    return f"<<{' '.join(_WORD.findall(answer)[:4]).title()}>>\n\n{answer}"


def _with_postscript(answer: str) -> str:
    return f"{answer}\n\nP.S. I hope this helps."


_STYLES: dict[str, Callable[[str], str]] = {
    "change_case:english_capital": str.upper,
    "change_case:english_lowercase": str.lower,
    "detectable_content:postscript": _with_postscript,
    "detectable_format:number_bullet_lists": _bulleted,
    "detectable_format:title": _with_title,
    "length_constraints:number_paragraphs": _starred,
    "punctuation:no_comma": lambda answer: answer.replace(",", ""),
    "startend:quotation": lambda answer: '"' + answer.replace('"', "'") + '"',
}


def _content_words(answer: str) -> list[str]:
    """Lowercase words of six letters or more, in the order of their first appearance."""
    return list(dict.fromkeys(word.lower() for word in _WORD.findall(answer) if len(word) >= 6))


def _keywords(answer: str, rng: random.Random) -> dict[str, Any] | None:
    words = _content_words(answer)
    return {"keywords": rng.sample(words, 2)} if len(words) >= 2 else None


def _frequency(answer: str, rng: random.Random) -> dict[str, Any] | None:
    counts = Counter(word.lower() for word in _WORD.findall(answer) if len(word) >= 5)
    repeated = sorted(word for word, count in counts.items() if count >= 2)
    if not repeated:
        return None
    word = rng.choice(repeated)
    return {"keyword": word, "frequency": counts[word], "relation": "at least"}


def _forbidden(answer: str, rng: random.Random) -> dict[str, Any] | None:
    unused = sorted(set(_COMMON) - {word.lower() for word in _WORD.findall(answer)})
    return {"forbidden_words": rng.sample(unused, 3)} if len(unused) >= 3 else None


def _letter(answer: str, rng: random.Random) -> dict[str, Any] | None:
    letter = rng.choice("bcdfghlmnprsuwy")
    count = answer.lower().count(letter)
    return {"letter": letter, "let_frequency": count, "let_relation": "at least"} if count >= 2 else None


def _sentences(answer: str, rng: random.Random) -> dict[str, Any] | None:
    from lm_eval.tasks.ifeval.instructions_util import count_sentences

    count = count_sentences(answer)
    if rng.random() < 0.5:
        return {"num_sentences": count + 1, "relation": "less than"}
    return {"num_sentences": count, "relation": "at least"} if count >= 2 else None


def _words(answer: str, rng: random.Random) -> dict[str, Any]:
    tens = len(_WORD.findall(answer)) // 10 * 10
    if rng.random() < 0.5 and tens >= 20:
        return {"num_words": tens, "relation": "at least"}
    return {"num_words": tens + 20, "relation": "less than"}


def _starred_paragraphs(answer: str, rng: random.Random) -> dict[str, Any] | None:
    count = answer.count("***") + 1
    return {"num_paragraphs": count} if count >= 2 else None


def _first_word(answer: str, rng: random.Random) -> dict[str, Any] | None:
    paragraphs = [paragraph for paragraph in answer.split("\n\n") if paragraph.strip()]
    if not 2 <= len(paragraphs) <= 5:
        return None
    number = rng.randrange(len(paragraphs))
    words = paragraphs[number].split()
    if not _WORD.fullmatch(words[0]):
        return None
    return {"num_paragraphs": len(paragraphs), "nth_paragraph": number + 1, "first_word": words[0].lower()}


def _bullets(answer: str, rng: random.Random) -> dict[str, Any] | None:
    count = len(re.findall(r"^\s*[*-]\s*[^*\s-]", answer, flags=re.MULTILINE))
    return {"num_bullets": count} if count >= 2 else None


def _highlights(answer: str, rng: random.Random) -> dict[str, Any] | None:
    count = len(re.findall(r"\*[^\n*]+\*", answer))
    return {"num_highlights": count} if count >= 1 else None


def _end(answer: str, rng: random.Random) -> dict[str, Any] | None:
    words = answer.split()
    return {"end_phrase": " ".join(words[-rng.choice([3, 4, 5]) :])} if len(words) >= 12 else None


def _capital_words(answer: str, rng: random.Random) -> dict[str, Any] | None:
    count = sum(word.isupper() for word in _WORD.findall(answer))
    return {"capital_frequency": count + 2, "capital_relation": "less than"} if count <= 5 else None


def _always(answer: str, rng: random.Random) -> dict[str, Any]:
    return {}


# Instruction -> keyword arguments that the answer may satisfy, or None. The checker has the last word.
_PROPOSALS: dict[str, Callable[[str, random.Random], dict[str, Any] | None]] = {
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _always,
    "change_case:english_lowercase": _always,
    "detectable_content:postscript": lambda answer, rng: {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": _always,
    "keywords:existence": _keywords,
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": _frequency,
    "keywords:letter_frequency": _letter,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "length_constraints:number_paragraphs": _starred_paragraphs,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_words": _words,
    "punctuation:no_comma": _always,
    "startend:end_checker": _end,
    "startend:quotation": _always,
}
