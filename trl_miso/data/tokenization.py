"""Contexts and completion to token ids: the boundary between contexts and output, and truncation.

The first answer token must be predicted from a *mixed* state, so the output begins before it: with the generation prompt
that the chat template adds (the assistant header), with `response_template` in plain text, or with the last token of the
prompt. These leading tokens are common to all contexts and carry no label. For one context, context + output is
token for token what SFTTrainer trains on.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, groupby, islice, pairwise
from operator import itemgetter
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trl_miso.data.chat_template import ChatRenderer
from trl_miso.data.contexts import ContextRow, Prompt, RowDropped
from trl_miso.segments import Example, common_prefix, encode, parallel, single, successive

# Tokenized in one call: what the tokenizer notes of each token takes a hundred times the text's memory.
_CHARACTERS = 2_000_000


@dataclass
class Tokenized:
    """Token ids of n >= 1 contexts and their common output, with labels (-100 on the output's unlabelled head)."""

    contexts: list[list[int]]
    output: list[int]
    labels: list[int]


@dataclass(frozen=True)
class RowTokenizer:
    """Renders and tokenizes rows, many at a time.

    Args:
        tokenizer: With a chat template if rows are conversational.
        chat_template: Used instead of the tokenizer's own.
        response_template: Text with which the output of plain-text rows begins, e.g. `"\\n### Response:\\n"`.
        assistant_only_loss: Label only what the template's `{% generation %}` markers enclose.
        chat: Whether rows are conversational; if None, as the first of the rows at hand.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    response_template: str | None = None
    assistant_only_loss: bool = False
    chat: bool | None = None

    @property
    def _chat(self) -> ChatRenderer:
        return ChatRenderer(self.tokenizer, self.chat_template)

    def __call__(
        self, rows: Sequence[ContextRow], template_kwargs: Sequence[dict[str, Any]]
    ) -> list[Tokenized | RowDropped]:
        """Tokenize rows with one call of the tokenizer. A row with nothing to learn from becomes its `RowDropped`.

        Raises:
            ValueError: If contexts have no common beginning of the output, or the chat template leaves out a turn.
        """
        rendered = self._render(rows, template_kwargs)
        results: list[Tokenized | RowDropped] = []
        plain = bool(rows) and isinstance(rows[0].completion, str)
        for row, kwargs, ids in zip(rows, template_kwargs, self._ids(rendered, plain), strict=True):
            try:
                results.append(self._assemble(row, kwargs, ids))
            except RowDropped as reason:
                results.append(reason)
        return results

    def _ids(self, rendered: list[list[str]], add_special_tokens: bool) -> Iterator[list[list[int]]]:
        """Token ids of each row's texts, cut at special tokens so that what they have in common is tokenized once."""
        cut = (lambda text: [text]) if add_special_tokens else self._cutter()
        pieces = [[cut(text) for text in texts] for texts in rendered]
        unique = list(dict.fromkeys(piece for texts in pieces for text in texts for piece in text))
        ids: dict[str, list[int]] = {}
        for run in _runs(unique, _CHARACTERS):
            ids |= zip(run, self._encode(run, add_special_tokens), strict=True)
        for texts in pieces:
            yield [list(chain.from_iterable(map(ids.__getitem__, text))) for text in texts]

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Equal to `self.tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]`, without noting the place of
        every token in its text where the tokenizers library does it all: a quarter of the time and of the memory."""
        kind, usual = type(self.tokenizer), PreTrainedTokenizerFast
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        if any(getattr(kind, name) is not getattr(usual, name, None) for name in ("__call__", "_encode_plus")):
            return self.tokenizer(texts, add_special_tokens=add_special_tokens, **options)["input_ids"]
        self.tokenizer("")  # sets the backend to neither cut nor pad
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def _cutter(self) -> Callable[[str], list[str]]:
        """Cuts text before special tokens, where its parts can be tokenized apart with the same result: tokenizers of the
        tokenizers library look for added tokens first, the leftmost and longest, and what is between them never meets."""
        added = self.tokenizer.added_tokens_decoder.values() if self.tokenizer.is_fast else ()
        found = sorted((t.content for t in added if not t.normalized), key=len, reverse=True)
        borders = {t.content for t in added if t.special and not t.lstrip}
        if not found or any(t.single_word for t in added):
            return lambda text: [text]
        search = re.compile("|".join(map(re.escape, found))).finditer

        def cut(text: str) -> list[str]:
            cuts = [0, *(match.start() for match in search(text) if match[0] in borders), len(text)]
            return [text[start:end] for start, end in pairwise(cuts)]

        return cut

    def _render(self, rows: Sequence[ContextRow], template_kwargs: Sequence[dict[str, Any]]) -> list[list[str]]:
        """Texts to tokenize of each row: the whole row, the first context up to the output, then every context's prompt."""
        kinds = {isinstance(row.completion, list) for row in rows}
        self._check_kinds(kinds)
        if True in kinds:
            return self._render_chat(rows, template_kwargs)
        return [self._render_text(row) for row in rows]

    def _check_kinds(self, kinds: set[bool]) -> None:
        if len(kinds | {self.chat} - {None}) > 1:
            raise ValueError(
                "Got rows of plain text and rows of messages in one dataset, expected one kind: only the former have special "
                "tokens added to them. Fix: convert one to the other."
            )

    def _render_chat(self, rows: Sequence[ContextRow], template_kwargs: Sequence[dict[str, Any]]) -> list[list[str]]:
        rendered = []
        for kwargs, group in groupby(zip(rows, template_kwargs, strict=True), key=itemgetter(1)):
            members = [row for row, _ in group]
            contexts = [cast(list[list], row.contexts) for row in members]
            rows_whole = [own[0] + cast(list, row.completion) for own, row in zip(contexts, members, strict=True)]
            wholes = self._chat(rows_whole, kwargs, checked_from=[0] * len(members))
            befores = self._chat([own[0] for own in contexts], kwargs)
            seen = [common_prefix(context, own[0]) for own in contexts for context in own]  # in the whole row
            prompts = self._chat(list(chain.from_iterable(contexts)), kwargs, seen, add_generation_prompt=True)
            rest = iter(prompts)
            rendered += [
                [whole, before, *islice(rest, len(own))]
                for whole, before, own in zip(wholes, befores, contexts, strict=True)
            ]
        return rendered

    def _render_text(self, row: ContextRow) -> list[str]:
        self._check_eos()
        eos = self.tokenizer.eos_token
        completion = cast(str, row.completion)
        contexts = cast(list[str], row.contexts)
        whole = contexts[0] + completion + ("" if completion.endswith(eos) else eos)
        return [whole, self._before_response(contexts), *contexts]

    def check(self, whole: Prompt, prompt: Prompt | None, kwargs: dict[str, Any]) -> None:
        """Check a row that TRL is to tokenize: all of it, and its prompt if it has one.

        Raises:
            RowDropped: If there is no assistant turn, the only kind to be learned.
            ValueError: As `__call__`.
        """
        self._check_kinds({isinstance(whole, list)})
        if not isinstance(whole, list):
            self._check_eos()
            return
        if self.assistant_only_loss and all(message["role"] != "assistant" for message in whole):
            raise RowDropped("no output: the conversation has no assistant turn")
        self._chat([whole], kwargs, checked_from=[0])
        if prompt is not None:
            self._chat([cast(list, prompt)], kwargs, add_generation_prompt=True)
        if self.assistant_only_loss:
            self._assistant_mask(whole, kwargs)

    def _check_eos(self) -> None:
        if not self.tokenizer.eos_token:
            raise ValueError(
                "Got rows of plain text and a tokenizer without an eos token, expected one: the model learns from it where to "
                "stop. Fix: set eos_token, of the tokenizer or in the config."
            )

    def _before_response(self, prompts: list[str]) -> str:
        """The first prompt up to the response template, which all prompts must end with."""
        first = prompts[0]
        if self.response_template is None:
            return first
        at = first.rfind(self.response_template)
        for prompt in prompts:
            if at < 0 or not prompt.endswith(first[at:]):
                raise ValueError(
                    f"Got a prompt that ends with {prompt[-100:]!r}, expected every prompt and context to end with "
                    f"response_template {self.response_template!r}. Fix: correct response_template, or end the prompts with it."
                )
        return first[:at]

    def _assemble(self, row: ContextRow, kwargs: dict[str, Any], ids: list[list[int]]) -> Tokenized:
        whole, before, *prompts = ids
        first = prompts[0]
        # As in TRL: the completion begins where prompt and prompt + completion part, tokens may merge across the border.
        completion_start = common_prefix(first, whole)
        if completion_start == 0:
            raise RowDropped("an empty context")
        # The output begins with what follows `before`, but with no token that differs between the contexts: the last
        # character of a context may merge into the first token of what follows, as in ".\n\n" + "### Response:".
        head = len(first) - min(common_prefix(before, whole), completion_start - 1)
        for prompt in prompts[1:]:
            head = common_prefix(first[: -head - 1 : -1], prompt[: -head - 1 : -1])
        start = len(first) - head
        if start >= completion_start:
            self._raise_no_common_head(prompts, len(first) - completion_start + 1, row)
        contexts = [prompt[: len(prompt) - head] for prompt in prompts]
        if len(contexts) > 1 and not all(contexts):
            raise RowDropped("an empty context")
        labels = [-100] * (completion_start - start) + whole[completion_start:]
        if self.assistant_only_loss:
            mask = self._assistant_mask(cast(list, row.contexts[0]) + cast(list, row.completion), kwargs)[start:]
            labels = [label if keep else -100 for label, keep in zip(labels, mask, strict=True)]
        return Tokenized(contexts, whole[start:], labels)

    def _assistant_mask(self, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> list[int]:
        options = {"chat_template": self.chat_template, **kwargs}
        mask = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )["assistant_masks"]
        if 1 not in mask:
            raise ValueError(
                "Got assistant_only_loss=True and a conversation in which the chat template marks no token as the assistant's, expected some. "
                "Fix: use a chat template with {% generation %} markers, or set assistant_only_loss=False."
            )
        return mask

    def _raise_no_common_head(self, prompts: list[list[int]], head: int, row: ContextRow) -> None:
        ends = list(dict.fromkeys(self.tokenizer.decode(prompt[-head:]) for prompt in prompts))
        if isinstance(row.completion, str):
            fix = "set response_template to text with which every prompt ends, e.g. '\\n### Response:\\n'"
        else:
            fix = "use a chat template whose generation prompt is the same after every context"
        raise ValueError(
            f"Got contexts that end differently: {ends}. Expected the tokens before the completion to be common to all "
            f"contexts, since the output begins with them. Fix: {fix}."
        )


@dataclass(frozen=True)
class Layout:
    """How tokenized rows become examples; see `MISOSFTConfig` for the fields."""

    max_length: int | None
    seed: int
    chunk_probs: tuple[float, ...]
    para_prob: float
    full_context_weight: float | None
    output_positions: str

    def __call__(self, tokenized: Tokenized, mode: str, weights: list[float] | None) -> dict[str, list[int]]:
        """Columns of one row in mode `"para"`, `"succ"` or `"single"`; `miso_cut` counts the output tokens cut off.

        Raises:
            RowDropped: If truncation leaves no label.
        """
        contexts = tokenized.contexts
        room = None if self.max_length is None else max(self.max_length - max(map(len, contexts)), 0)
        output, labels = tokenized.output[:room], tokenized.labels[:room]
        if all(label == -100 for label in labels):
            cut = any(label != -100 for label in tokenized.labels)
            raise RowDropped("no label left within max_length" if cut else "no label")
        if mode == "para" and len(contexts) > 1:
            weights = weights or self._weights(len(contexts))
            tokens, example = parallel(contexts, len(output), weights, self.output_positions)
        elif mode == "succ" and (chunks := self._chunks(contexts[0], tokenized.output)) > 1:
            tokens = contexts[0]
            size, longer = divmod(len(tokens), chunks)  # as numpy.array_split does
            example = successive([size + 1] * longer + [size] * (chunks - longer), len(output))
        else:
            tokens, example = contexts[0], single(len(contexts[0]) + len(output))
        made = columns(tokens + output, [-100] * len(tokens) + labels, example)
        return made | {"miso_cut": [len(tokenized.output) - len(output)]}

    def is_mixed(self, full: ContextRow) -> bool:
        """Whether a row that could be para is presented so: drawn with `para_prob` from (seed, full context, completion)."""
        return self.para_prob >= 1 or _draw(self.seed, "para", full.text.encode()) < self.para_prob

    def _weights(self, n: int) -> list[float]:
        if self.full_context_weight is None:
            return [1 / n] * n
        return [self.full_context_weight] + [(1 - self.full_context_weight) / (n - 1)] * (n - 1)

    def _chunks(self, tokens: Sequence[int], output: Sequence[int]) -> int:
        drawn = _draw(self.seed, "chunks", np.asarray([*tokens, *output], dtype=np.int64).tobytes())
        chunks = int(np.searchsorted(np.cumsum(self.chunk_probs), drawn * sum(self.chunk_probs), side="right")) + 1
        return max(1, min(chunks, len(self.chunk_probs), len(tokens)))


def columns(input_ids: list[int], labels: list[int], example: Example) -> dict[str, list[int]]:
    """Dataset columns of one example."""
    return {"input_ids": input_ids, "labels": labels, "miso_layout": encode(example)}


def _runs(texts: list[str], size: int) -> Iterator[list[str]]:
    """The texts in runs that end with the text that brings them to `size` characters."""
    run, length = [], 0
    for text in texts:
        run.append(text)
        length += len(text)
        if length >= size:
            yield run
            run, length = [], 0
    if run:
        yield run


def _draw(seed: int, purpose: str, row: bytes) -> float:
    """Uniform in [0, 1), a function of the seed and the row's content: the same on every rank, in any order, after a resume."""
    digest = blake2b(row, digest_size=8, salt=purpose.encode(), key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big") / 2**64
