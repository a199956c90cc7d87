"""Tokenized rows to examples: weights of the contexts, chunks, truncation, and the draws that depend on the seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, pairwise

import numpy as np

from trl_miso.data.contexts import ContextRow
from trl_miso.data.options import DataOptions
from trl_miso.data.schema import RowDropped
from trl_miso.data.tokenization import Tokenized
from trl_miso.segments import Answer, Example, common_prefix, encode, lay_out

NOT_FITTING = "an answer has no label within max_length and is left out"


@dataclass(frozen=True)
class Layout:
    """Lays out tokenized rows as examples.

    Args:
        options: `max_length`, `seed`, `chunk_probs`, `para_prob`, `full_context_weight` and `output_positions` are read.
    """

    options: DataOptions

    def __call__(
        self, tokenized: Sequence[Tokenized], mode: str, weights: Sequence[list[float] | None]
    ) -> dict[str, list]:
        """The prepared columns of one row, without its row number.

        Args:
            tokenized: The answers of the row.
            mode: `"para"`, `"succ"` or `"single"`.
            weights: For each answer the row's own context weights; None for the weights of the config.

        Returns:
            `input_ids` and `labels` (one per token), `miso_layout` (see `segments.encode`), `miso_cut`, the number of output
            tokens that truncation removed, and `miso_notes`, what the user should know about the row.

        Raises:
            RowDropped: If truncation leaves no label.
        """
        answers: list[Answer] = []
        turns: list[int | None] = []
        notes: dict[str, None] = {}
        cut = 0
        for answer, own_weights in zip(tokenized, weights, strict=True):
            output, labels = self._truncated(answer)
            cut += len(answer.output) - len(output)
            if any(label != -100 for label in labels):
                answers.append(self._answer(answer, output, labels, mode, own_weights))
                turns.append(answer.turn)
                notes |= dict.fromkeys(answer.notes)
            elif any(label != -100 for label in answer.labels):
                notes[NOT_FITTING] = None
        if not answers:
            raise RowDropped("no label left within max_length" if NOT_FITTING in notes else "no label")
        ids, labels, example = lay_out(_as_history(answers, turns))
        return columns(ids, labels, example) | {"miso_cut": [cut], "miso_notes": list(notes)}

    def _answer(
        self, tokenized: Tokenized, output: list[int], labels: list[int], mode: str, weights: list[float] | None
    ) -> Answer:
        contexts = tokenized.contexts
        if mode == "para" and len(contexts) > 1:
            weights = weights or context_weights(len(contexts), self.options.full_context_weight)
            return Answer(contexts, output, labels, weights, self.options.output_positions)
        chunks = self._num_chunks(contexts[0], tokenized.output) if mode == "succ" else 1
        if chunks == 1:
            return Answer(contexts[:1], output, labels)
        ends = list(accumulate(_even_lengths(len(contexts[0]), chunks), initial=0))
        parts = [contexts[0][start:end] for start, end in pairwise(ends)]
        return Answer(parts, output, labels, [1 / chunks] * chunks, "chunks")

    def is_mixed(self, full: ContextRow) -> bool:
        """Whether a row that can be para is presented as para: a draw with `para_prob` from (seed, full context, completion)."""
        if self.options.para_prob >= 1:
            return True
        return _draw(self.options.seed, "para", full.text.encode()) < self.options.para_prob

    def _truncated(self, tokenized: Tokenized) -> tuple[list[int], list[int]]:
        """Output and labels, cut so that the longest context and the output fit into `max_length`."""
        output, labels = tokenized.output, tokenized.labels
        if self.options.max_length is not None:
            room = max(self.options.max_length - max(map(len, tokenized.contexts)), 0)
            output, labels = output[:room], labels[:room]
        return output, labels

    def _num_chunks(self, tokens: Sequence[int], output: Sequence[int]) -> int:
        """A draw with `chunk_probs` from (seed, tokens, output) (paper, Appendix C); at most one chunk per token."""
        probs = self.options.chunk_probs
        drawn = _draw(self.options.seed, "chunks", np.asarray([*tokens, *output], dtype=np.int64).tobytes())
        chunks = int(np.searchsorted(np.cumsum(probs), drawn * sum(probs), side="right")) + 1
        return max(1, min(chunks, len(probs), len(tokens)))


def _as_history(answers: list[Answer], turns: Sequence[int | None]) -> list[Answer]:
    """Causal runs, each cut to the part of it that later answers see, if that holds the turn: they then share its tokens.

    What is cut off are tokens that the chat template adds after the last turn of a conversation.
    """
    cut: list[Answer] = []
    later: list[Sequence[int]] = []  # what the answers after the one at hand see
    for answer, turn in zip(answers[::-1], turns[::-1], strict=True):
        if answer.weights:
            later += answer.begun
            cut.append(answer)
            continue
        run, start = [*answer.contexts[0], *answer.output], len(answer.contexts[0])
        seen = -start
        for other in later:
            shared = common_prefix(run, other)
            # A context or chunk that ends within the run shares all of its tokens already.
            if shared < len(other) or shared == len(run):
                seen = max(seen, shared - start)
        if turn is not None and seen >= turn:
            answer = answer._replace(output=answer.output[:seen], labels=answer.labels[:seen])
        later.append(run)
        cut.append(answer)
    return cut[::-1]


def context_weights(n: int, full_context_weight: float | None) -> list[float]:
    """Weights of n contexts, the full one first: 1/n each, or `full_context_weight` and an even split of the rest."""
    if full_context_weight is None or n == 1:
        return [1 / n] * n
    return [full_context_weight] + [(1 - full_context_weight) / (n - 1)] * (n - 1)


def columns(input_ids: list[int], labels: list[int], example: Example) -> dict[str, list[int]]:
    """The dataset columns of one example."""
    return {"input_ids": input_ids, "labels": labels, "miso_layout": encode(example)}


def _even_lengths(total: int, parts: int) -> list[int]:
    """The lengths of `numpy.array_split(range(total), parts)`."""
    size, longer = divmod(total, parts)
    return [size + 1] * longer + [size] * (parts - longer)


def _draw(seed: int, purpose: str, row: bytes) -> float:
    """A number in [0, 1) that depends on the seed and the row's content only: equal on every rank, in any order, after a resume."""
    digest = blake2b(row, digest_size=8, salt=purpose.encode(), key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big") / 2**64
