"""Assign each token of a full prompt to a part: a constraint, the base instruction, another turn, the output, or the rest.

The place of a turn in the rendered prompt is not searched for: the turn is rendered once more with another text, and the place is
where the two renderings differ. Within the last turn, the base instruction and the constraints are searched for verbatim;
a base instruction that constraints interrupt is searched for word by word.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from trl_miso.data.chat_template import ChatRenderer
from trl_miso.data.schema import Prompt, RowDropped, message_texts
from trl_miso.segments import common_prefix

KINDS = ("output", "constraint", "base", "system", "earlier", "rest")
_OUTPUT, _REST = 0, 1  # indices of the first two parts of every prompt
_OTHER = "\ue001 another text \ue001"  # private-use characters: occurs in no data

Span = tuple[int, int]  # start and end in a text


class Part(NamedTuple):
    """A part of a prompt: its kind, one of `KINDS`, and its text. `"rest"` is the template's markup and the text between parts."""

    kind: str
    text: str = ""


class PromptParts(NamedTuple):
    """A full prompt: its token ids, its parts (output, rest, then all others), and the index of the part of each token."""

    ids: list[int]
    parts: list[Part]
    owners: list[int]

    def without_last(self, tokens: int) -> "PromptParts":
        """The prompt without its last `tokens` tokens."""
        kept = len(self.ids) - tokens
        return self._replace(ids=self.ids[:kept], owners=self.owners[:kept])


def read_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    base: str | None,
    constraints: Sequence[str],
    response_template: str | None,
    kwargs: dict[str, Any],
) -> PromptParts:
    """Tokenize a prompt as training does, and assign every token to exactly one part.

    A token belongs to the part of its last character that is not white space. The output begins with the generation prompt (or
    with `response_template`), as it does under several contexts.

    Args:
        tokenizer: A fast tokenizer with the chat template to use.
        prompt: The full prompt, as messages or text.
        base: The base instruction, which the last turn contains verbatim, or in pieces around the constraints; None if the whole turn is
            the base instruction.
        constraints: Texts that the last turn contains verbatim, each in a place of its own.
        response_template: Text with which the output of plain text begins.
        kwargs: Arguments of the chat template.

    Raises:
        RowDropped: If a text is not in its turn.
        ValueError: If the tokenizer gives no offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"Got {type(tokenizer).__name__}, which does not tell which characters a token stands for. Expected a tokenizer of the "
            "tokenizers library. Fix: load the model's fast tokenizer."
        )
    parts = [Part("output"), Part("rest")]
    spans: list[list[Span]] = []  # of the parts from the third on
    if isinstance(prompt, str):
        text, last_turn, output = prompt, (0, len(prompt)), response_start(prompt, response_template)
    else:
        text, turns, output = _render_turns(tokenizer, prompt, kwargs)
        *earlier, last_turn = turns
        for message, (start, end) in zip(prompt, earlier, strict=False):
            kind = "system" if message["role"] in ("system", "developer") else "earlier"
            parts.append(Part(kind, text[start:end]))
            spans.append([(start, end)])
    for kind, places in _instruction_spans(text, last_turn, base, constraints):
        parts.append(Part(kind, " ... ".join(text[start:end] for start, end in places)))
        spans.append(places)

    # The part of each character, then of each token.
    owner = np.full(len(text) + 1, _REST, dtype=np.int64)
    for part, places in enumerate(spans, start=2):
        for start, end in places:
            owner[start:end] = part
    owner[output : len(text)] = _OUTPUT
    encoding = tokenizer(text, add_special_tokens=isinstance(prompt, str), return_offsets_mapping=True)
    owners = [_owner(text, owner, start, end) for start, end in encoding["offset_mapping"]]
    return PromptParts(encoding["input_ids"], parts, owners)


def response_start(prompt: str, response_template: str | None) -> int:
    """Where the output of a plain-text prompt begins: at its last `response_template`, without one at its end."""
    at = prompt.rfind(response_template) if response_template else -1
    return at if at >= 0 else len(prompt)


def _render_turns(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], kwargs: dict[str, Any]
) -> tuple[str, list[Span], int]:
    """The rendered prompt, the span of each turn's text in it, and where the generation prompt begins."""
    variants = [[*messages[:i], m | {"content": _OTHER}, *messages[i + 1 :]] for i, m in enumerate(messages)]
    render = ChatRenderer(tokenizer)
    text, *others = render([messages, *variants], kwargs, add_generation_prompt=True)
    (without_generation_prompt,) = render([messages], kwargs)
    turns = []
    for message, other in zip(messages, others, strict=True):
        start = common_prefix(text, other)
        end = len(text) - common_prefix(text[start:][::-1], other[start:][::-1])
        is_verbatim = [text[start:end].strip()] == [content.strip() for content in message_texts(message)]
        if other == text or not is_verbatim:
            raise RowDropped("a turn that the chat template leaves out or rewrites")
        turns.append((start, end))
    return text, turns, common_prefix(without_generation_prompt, text)


def _instruction_spans(
    text: str, turn: Span, base: str | None, constraints: Sequence[str]
) -> Iterator[tuple[str, list[Span]]]:
    """The kinds and spans of the base instruction and of the constraints in a turn; no two spans overlap."""
    start, end = turn
    content, is_taken = text[start:end], np.zeros(end - start, dtype=bool)

    def claim(part: str, places: Sequence[int]) -> Span | None:
        for i in places:
            if i >= 0 and content.startswith(part, i) and not is_taken[i : i + len(part)].any():
                is_taken[i : i + len(part)] = True
                return start + i, start + i + len(part)
        return None

    if base is None and not constraints:
        yield "base", [turn]
        return
    base = (base or "").strip()
    base_span = claim(base, [0, len(content.rstrip()) - len(base), content.find(base)]) if base else None
    # Longest first, so that no constraint is found within another; last place first, since lists of constraints come last.
    spans: dict[int, Span] = {}
    for i in sorted(range(len(constraints)), key=lambda i: -len(constraints[i])):
        constraint = constraints[i].strip()
        span = claim(constraint, _places(content, constraint))
        if span is None:
            raise RowDropped("a constraint that is not in the prompt verbatim")
        spans[i] = span
    base_spans = [base_span] if base_span else _pieces(content, base, is_taken, start)
    if not base_spans:
        raise RowDropped("the base instruction that is not in the prompt verbatim")
    yield "base", base_spans
    for i in range(len(constraints)):
        yield "constraint", [spans[i]]


def _pieces(content: str, base: str, is_taken: np.ndarray, start: int) -> list[Span]:
    """The spans that hold the words of the base instruction, in its order, beside what is taken; empty if a word is missing.

    Words between two of them that are not the base's (such as "also" in front of a constraint) interrupt a span.
    """
    spans: list[Span] = []
    words = iter(re.finditer(r"(\w+)[^\w\s]*", content))  # with the punctuation behind it
    interrupted = True
    for wanted in re.findall(r"\w+", base):
        for word in words:
            if word[1] == wanted and not is_taken[slice(*word.span())].any():
                break
            interrupted = True
        else:
            return []
        begin = start + word.start() if interrupted else spans.pop()[0]
        spans.append((begin, start + word.end()))
        interrupted = False
    return spans


def _places(text: str, part: str) -> list[int]:
    """Where `part` begins in `text`, the last place first."""
    places: list[int] = []
    at = text.rfind(part)
    while at >= 0:
        places.append(at)
        at = text.rfind(part, 0, at + len(part) - 1)
    return places


def _owner(text: str, owner: np.ndarray, start: int, end: int) -> int:
    """The part of a token that stands for `text[start:end]`. An added special token stands for no text: it is of the rest."""
    if start == end:
        return _REST
    visible = len(text[start:end].rstrip()) or end - start
    return int(owner[start + visible - 1])
