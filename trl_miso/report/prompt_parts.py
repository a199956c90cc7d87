"""What each token of a full prompt belongs to: a constraint, the base instruction, another turn, the output, or the rest.

Where a turn's text stands in the rendered prompt is not searched for: the turn is rendered with another text, and what
changes is its place. Within the last turn the base instruction and the constraints are looked for verbatim.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from trl_miso.data.chat_template import ChatRenderer
from trl_miso.data.contexts import Prompt, RowDropped, message_texts
from trl_miso.segments import common_prefix

KINDS = ("output", "constraint", "base", "system", "earlier", "rest")
_OTHER = "\ue001 another text \ue001"  # in no data


class Part(NamedTuple):
    """One of `KINDS`, and its text in the prompt; `"rest"` is the template's markup and what joins the others."""

    kind: str
    text: str = ""


class Prompted(NamedTuple):
    """A full prompt: its token ids, the parts, the output first, and for each token the index of its part."""

    ids: list[int]
    parts: list[Part]
    owners: list[int]

    def without_last(self, tokens: int) -> "Prompted":
        """Without as many tokens of its end."""
        kept = len(self.ids) - tokens
        return self._replace(ids=self.ids[:kept], owners=self.owners[:kept])


def read_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    base: str | None,
    constraints: Sequence[str],
    response_template: str | None,
    kwargs: dict[str, Any],
) -> Prompted:
    """Tokenize a prompt as training does, and tell its tokens apart. Every token is in exactly one part.

    A token is of the part of its last character that is no white space. The output begins with the generation prompt (or with
    `response_template`), as under several contexts.

    Args:
        tokenizer: With the chat template that is to be used.
        prompt: The full prompt, as messages or text.
        base: The base instruction, which the last turn has verbatim; None: the whole turn is it.
        constraints: Each somewhere else in that turn, verbatim.
        kwargs: Of the chat template.

    Raises:
        RowDropped: If a text is not where it should be.
        ValueError: If the tokenizer does not say where its tokens come from.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"Got {type(tokenizer).__name__}, which does not say where in the text its tokens come from. Expected a tokenizer of the "
            "tokenizers library. Fix: load the model's fast tokenizer."
        )
    parts, owned = [Part("output"), Part("rest")], [(0, 0, 1)]  # spans (start, end, part); later ones win
    if isinstance(prompt, str):
        text, last, output = prompt, (0, len(prompt)), _response(prompt, response_template)
    else:
        text, turns, output = _rendered(tokenizer, prompt, kwargs)
        *others, last = turns
        for message, (start, end) in zip(prompt, others, strict=False):
            parts.append(Part("system" if message["role"] in ("system", "developer") else "earlier", text[start:end]))
            owned.append((start, end, len(parts) - 1))
    for kind, (start, end) in _within(text, last, base, constraints):
        parts.append(Part(kind, text[start:end]))
        owned.append((start, end, len(parts) - 1))
    owner = np.ones(len(text) + 1, dtype=np.int64)
    for start, end, part in [*owned, (output, len(text), 0)]:
        owner[start:end] = part
    encoding = tokenizer(text, add_special_tokens=isinstance(prompt, str), return_offsets_mapping=True)
    owners = [_owner(text, owner, *span) for span in encoding["offset_mapping"]]
    return Prompted(encoding["input_ids"], parts, owners)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], kwargs: dict[str, Any]
) -> tuple[str, list[tuple[int, int]], int]:
    """The prompt, where each turn's text stands in it, and where the generation prompt begins."""
    variants = [[*messages[:i], m | {"content": _OTHER}, *messages[i + 1 :]] for i, m in enumerate(messages)]
    render = ChatRenderer(tokenizer)
    text, *others = render([messages, *variants], kwargs, add_generation_prompt=True)
    (before,) = render([messages], kwargs)
    turns = []
    for message, other in zip(messages, others, strict=True):
        start = common_prefix(text, other)
        end = len(text) - common_prefix(text[start:][::-1], other[start:][::-1])
        said = message_texts(message)
        if other == text or [text[start:end].strip()] != [t.strip() for t in said]:
            raise RowDropped("a turn that the chat template leaves out or rewrites")
        turns.append((start, end))
    return text, turns, common_prefix(before, text)


def _response(prompt: str, response_template: str | None) -> int:
    at = prompt.rfind(response_template) if response_template else -1
    return at if at >= 0 else len(prompt)


def _within(
    text: str, turn: tuple[int, int], base: str | None, constraints: Sequence[str]
) -> list[tuple[str, tuple[int, int]]]:
    """Where the base instruction and the constraints stand in a turn, none of them within another."""
    start, end = turn
    said, taken = text[start:end], np.zeros(end - start, dtype=bool)

    def claim(wanted: str, at: Sequence[int]) -> tuple[int, int] | None:
        for i in at:
            if i >= 0 and said.startswith(wanted, i) and not taken[i : i + len(wanted)].any():
                taken[i : i + len(wanted)] = True
                return start + i, start + i + len(wanted)
        return None

    if base is None and not constraints:
        return [("base", turn)]
    found: dict[int, tuple[int, int] | None] = {}
    base = (base or "").strip()
    ends = [0, len(said.rstrip()) - len(base), said.find(base)]
    found[-1] = claim(base, ends) if base else None
    # Longest first, so that none is found within another; the last place first, since lists of constraints come last.
    for i in sorted(range(len(constraints)), key=lambda i: -len(constraints[i])):
        wanted = constraints[i].strip()
        found[i] = claim(wanted, _places(said, wanted))
    if None in found.values():
        missing = "the base instruction" if found[-1] is None else "a constraint"
        raise RowDropped(f"{missing} that is not in the prompt verbatim")
    spans = [("base", found[-1]), *(("constraint", found[i]) for i in range(len(constraints)))]
    return cast(list[tuple[str, tuple[int, int]]], spans)


def _places(text: str, wanted: str) -> list[int]:
    """Where `wanted` begins in `text`, the last place first."""
    places: list[int] = []
    at = len(text)
    while (at := text.rfind(wanted, 0, at + len(wanted) - 1 if places else None)) >= 0:
        places.append(at)
    return places


def _owner(text: str, owner: np.ndarray, start: int, end: int) -> int:
    """The part of a token that stands for `text[start:end]`: a special token that was added stands for nothing, the rest."""
    if start == end:
        return 1
    shown = len(text[start:end].rstrip()) or end - start
    return int(owner[start + shown - 1])
