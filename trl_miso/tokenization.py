"""Contexts and completion to token ids: the boundary between contexts and output, and truncation.

The first answer token must be predicted from a *mixed* state, so the output begins before it: with the generation prompt
that the chat template adds (the assistant header), with `response_template` in plain text, or with the last token of the
prompt. These leading tokens are common to all contexts and carry no label. For one context, context + output is
token for token what SFTTrainer trains on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from trl_miso.contexts import Prompt, Row, RowDropped
from trl_miso.segments import Example, encode, parallel, single, successive


@dataclass
class Tokenized:
    """Token ids of n >= 1 contexts and their common output, with labels (-100 on the output's unlabelled head)."""

    contexts: list[list[int]]
    output: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Tokenizer:
    """Renders and tokenizes rows, many at a time.

    Args:
        tokenizer: With a chat template if rows are conversational.
        chat_template: Used instead of the tokenizer's own.
        response_template: Text with which the output of plain-text rows begins, e.g. `"\\n### Response:\\n"`.
        assistant_only_loss: Label only what the template's `{% generation %}` markers enclose.
    """

    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None = None
    response_template: str | None = None
    assistant_only_loss: bool = False

    def __call__(self, rows: Sequence[Row], template_kwargs: Sequence[dict[str, Any]]) -> list[Tokenized | RowDropped]:
        """Tokenize rows with one call of the tokenizer. A row with nothing to learn from becomes its `RowDropped`.

        Raises:
            ValueError: If contexts have no common beginning of the output.
        """
        texts, spans = [], []
        for row, kwargs in zip(rows, template_kwargs, strict=True):
            rendered = self._render(row, kwargs)
            spans.append(slice(len(texts), len(texts) + len(rendered)))
            texts += rendered
        conversational = [not isinstance(row.completion, str) for row in rows]
        ids = self._ids(texts, add_special_tokens=not any(conversational))
        results: list[Tokenized | RowDropped] = []
        for row, kwargs, span in zip(rows, template_kwargs, spans, strict=True):
            try:
                results.append(self._assemble(row, kwargs, ids[span]))
            except RowDropped as reason:
                results.append(reason)
        return results

    def _ids(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"] if texts else []

    def _render(self, row: Row, kwargs: dict[str, Any]) -> list[str]:
        """Texts to tokenize: the whole row, the first context up to the output, then every context's prompt."""
        first = row.contexts[0]
        if not isinstance(row.completion, str):
            whole = self._chat(first + row.completion, kwargs)
            before = self._chat(first, kwargs)
            return [whole, before, *(self._chat(c, kwargs, add_generation_prompt=True) for c in row.contexts)]
        eos = self.tokenizer.eos_token or ""
        completion = row.completion if row.completion.endswith(eos) else row.completion + eos
        return [first + completion, self._before_response(first), *row.contexts]

    def _chat(self, messages: Prompt, kwargs: dict[str, Any], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, **{"chat_template": self.chat_template, **kwargs, **options}
        )

    def _before_response(self, prompt: str) -> str:
        if self.response_template is None:
            return prompt
        at = prompt.rfind(self.response_template)
        if at < 0:
            raise ValueError(
                f"Got a prompt without response_template {self.response_template!r}: {prompt[-100:]!r}. Expected it near the end "
                "of every context. Fix: correct response_template, or add it to the prompts."
            )
        return prompt[:at]

    def _assemble(self, row: Row, kwargs: dict[str, Any], ids: list[list[int]]) -> Tokenized:
        whole, before, *prompts = ids
        # As in TRL: the completion begins where prompt and prompt + completion part, tokens may merge across the border.
        completion_start = common_prefix_length(prompts[0], whole)
        start = min(common_prefix_length(before, whole), completion_start - 1)
        if start < 0:
            raise RowDropped("an empty context")
        head = prompts[0][start:]
        contexts = [whole[:start]]
        for prompt in prompts[1:]:
            if prompt[-len(head) :] != head:
                self._raise_no_common_head(head, prompt, row)
            contexts.append(prompt[: -len(head)])
        if len(contexts) > 1 and not all(contexts):
            raise RowDropped("an empty context")
        labels = [-100] * (completion_start - start) + whole[completion_start:]
        if self.assistant_only_loss:
            mask = self._assistant_mask(row, kwargs)[start:]
            labels = [label if keep else -100 for label, keep in zip(labels, mask, strict=True)]
        return Tokenized(contexts, whole[start:], labels)

    def _assistant_mask(self, row: Row, kwargs: dict[str, Any]) -> list[int]:
        options = {"chat_template": self.chat_template, **kwargs}
        messages = row.contexts[0] + row.completion  # type: ignore[operator]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )["assistant_masks"]

    def _raise_no_common_head(self, head: list[int], prompt: list[int], row: Row) -> None:
        decode = self.tokenizer.decode
        if isinstance(row.completion, str):
            fix = "set response_template to text with which every prompt ends, e.g. '\\n### Response:\\n'"
        else:
            fix = "use a chat template whose generation prompt is the same after every context"
        raise ValueError(
            f"Got contexts that end differently: {decode(head)!r} and {decode(prompt[-len(head) :])!r}. Expected the tokens before "
            f"the completion to be common to all contexts, since the output begins with them. Fix: {fix}."
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
        """Columns `input_ids`, `labels`, `miso_layout` of one row in mode `"para"`, `"succ"` or `"single"`.

        Raises:
            RowDropped: If truncation leaves no label.
        """
        contexts = tokenized.contexts
        longest = max(map(len, contexts))
        room = None if self.max_length is None else max(self.max_length - longest, 0)
        output, labels = tokenized.output[:room], tokenized.labels[:room]
        if all(label == -100 for label in labels):
            raise RowDropped("no label left within max_length" if room is not None else "no label")
        if mode == "para" and len(contexts) > 1:
            n = len(contexts)
            tokens, example = parallel(
                contexts, len(output), weights or self._weights(n), self.output_positions
            )
        elif mode == "succ" and (chunks := self._chunks(contexts[0], tokenized.output)) > 1:
            tokens = contexts[0]
            lengths = [len(part) for part in np.array_split(np.arange(len(tokens)), chunks)]
            example = successive(lengths, len(output))
        else:
            tokens, example = contexts[0], single(len(contexts[0]) + len(output))
        return columns(tokens + output, [-100] * len(tokens) + labels, example)

    def is_mixed(self, full: Sequence[int]) -> bool:
        """Whether a row that could be para is presented so: drawn with `para_prob` from (seed, full context)."""
        return self.para_prob >= 1 or _draw(self.seed, "para", full) < self.para_prob

    def _weights(self, n: int) -> list[float]:
        if self.full_context_weight is None:
            return [1 / n] * n
        return [self.full_context_weight] + [(1 - self.full_context_weight) / (n - 1)] * (n - 1)

    def _chunks(self, tokens: Sequence[int], output: Sequence[int]) -> int:
        drawn = _draw(self.seed, "chunks", [*tokens, *output])
        chunks = int(np.searchsorted(np.cumsum(self.chunk_probs), drawn * sum(self.chunk_probs), side="right")) + 1
        return max(1, min(chunks, len(self.chunk_probs), len(tokens)))


def columns(input_ids: list[int], labels: list[int], example: Example) -> dict[str, list[int]]:
    """Dataset columns of one example."""
    return {"input_ids": input_ids, "labels": labels, "miso_layout": encode(example)}


def _draw(seed: int, purpose: str, tokens: Sequence[int]) -> float:
    """Uniform in [0, 1), a function of the seed and the row's tokens: the same on every rank, in any order, after a resume."""
    digest = blake2b(np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=8, salt=purpose.encode(), key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big") / 2**64
