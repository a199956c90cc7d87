"""Statistics of prepared rows, and the estimated cost of a step on them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from trl_miso.attention.support import head_dim
from trl_miso.segments import Example, decode_with, single, trained_spans, unshare

_PERCENTILES = [0, 5, 25, 50, 75, 95, 100]


@dataclass(frozen=True)
class ModelShape:
    """What a model's compute depends on.

    `weights` is the number of weights that every token is multiplied with; `width` is query heads times head dimension,
    summed over layers; `vocab_size` is the number of token ids, which bounds those of the rows.
    """

    name: str
    weights: int
    width: int
    vocab_size: int | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig, name: str) -> "ModelShape":
        """The shape of a config. All experts of a mixture of experts count, which understates attention's share."""
        model = meta_model(config)
        text = config.get_text_config()
        head = model.get_output_embeddings()
        embedding = model.get_input_embeddings().weight
        weights = sum(p.numel() for p in model.parameters())
        is_tied = head is not None and head.weight is embedding
        if not is_tied:
            weights -= embedding.numel()  # a lookup, not a multiplication
        width = text.num_hidden_layers * text.num_attention_heads * head_dim(text)
        return cls(name, weights, width, getattr(text, "vocab_size", None))

    def flops(self, tokens: int, score_pairs: int) -> int:
        """FLOPs of a forward pass: 2 per weight and token, and 4 per unit of width and score pair (QK and PV)."""
        return 2 * self.weights * tokens + 4 * self.width * score_pairs


@dataclass(frozen=True)
class Baseline:
    """Tokens and score pairs of plain SFT on the full prompts, by number of the raw row; without rows that it drops."""

    tokens: dict[int, int]
    pairs: dict[int, int]

    @classmethod
    def of(cls, prepared: Dataset, max_length: int | None = None) -> "Baseline":
        """From rows of causal runs, each cut to `max_length` if it is given. Several completions of a row are several runs."""
        tokens, pairs = Counter[int](), Counter[int]()
        for row in _examples(prepared):
            bounds = list(accumulate((segment.length for segment in row.example.segments), initial=0))
            for run in row.example.copies():
                length = sum(row.example.segments[i].length for i in run)
                if max_length is not None:
                    labels = np.concatenate([row.labels[bounds[i] : bounds[i + 1]] for i in run])
                    if (labels[:max_length] == -100).all():
                        continue
                    length = min(length, max_length)
                tokens[row.number] += length
                pairs[row.number] += score_pairs(single(length))
        return cls(tokens, pairs)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: its modules without memory for weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def score_pairs(example: Example) -> int:
    """Query-key pairs that attention scores: each segment with its path, causally, and each output with all of its contexts."""
    pairs = 0
    for i, segment in enumerate(example.segments):
        pairs += segment.length * (segment.length + 1) // 2
        pairs += segment.length * (example.path_length(i) - segment.length)
    for output in example.outputs:
        length = example.segments[output.segment].length
        pairs += length * sum(example.path_length(branch.segment) for branch in output.branches)
    return pairs


def dataset_statistics(
    prepared: Dataset, mode: str, baseline: Baseline, shape: ModelShape, shared: bool
) -> dict[str, Any]:
    """Counts over a whole prepared dataset; see `preview_dataset`.

    Args:
        mode: The mode in which the rows were prepared.
        baseline: Plain SFT on the same rows. The cost is compared over the rows that both train on.
        shared: Whether common prefixes are computed once.
    """
    totals = _Totals(mode, shared)
    for row in _examples(prepared):
        totals.add(row, compared=row.number in baseline.tokens)
    return totals.report() | {"cost": totals.cost(baseline, shape)}


class _Row(NamedTuple):
    """One example: the number of its raw row, the output tokens that were cut from the row, notes on the row, and its labels."""

    number: int
    cut: int
    notes: list[str]
    example: Example
    labels: np.ndarray


@dataclass
class _Totals:
    """Sums and lists over examples."""

    mode: str
    shared: bool
    modes: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)  # answers of an example -> examples
    contexts: Counter[int] = field(default_factory=Counter)  # contexts of an answer -> answers
    unique: list[int] = field(default_factory=list)
    longest_path: list[int] = field(default_factory=list)
    longest_context: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    noted: dict[str, list[int]] = field(default_factory=dict)
    compared_rows: set[int] = field(default_factory=set)
    compared_tokens: int = 0
    compared_pairs: int = 0
    unshared: int = 0
    labelled: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0

    def add(self, row: _Row, compared: bool) -> None:
        example = row.example
        computed = example if self.shared else unshare(example, [])[0]
        self.modes[self.mode if example.outputs or self.mode == "augment" else "single"] += 1
        self._add_answers(example, row.labels)
        self.unique.append(computed.num_tokens)
        self.longest_path.append(example.longest)
        self.unshared += example.num_unshared_tokens
        self.labelled += int((row.labels != -100).sum())
        self.cut_rows += row.cut > 0
        self.cut_tokens += row.cut
        for note in row.notes:
            self.noted.setdefault(note, []).append(row.number)
        if compared:
            self.compared_rows.add(row.number)
            self.compared_tokens += computed.num_tokens
            self.compared_pairs += score_pairs(computed)

    def _add_answers(self, example: Example, labels: np.ndarray) -> None:
        spans = trained_spans(example, labels)
        branches_of = {output.segment: output.branches for output in example.outputs}
        begins = list(accumulate((segment.length for segment in example.segments), initial=0))
        self.answers[len(spans)] += 1
        for span in spans:
            branches = branches_of.get(span.segment, ())
            above = example.path_length(span.segment) - example.segments[span.segment].length
            lengths = [example.path_length(branch.segment) for branch in branches]
            self.contexts[max(1, len(branches))] += 1
            self.longest_context.append(max(lengths, default=above + span.start - begins[span.segment]))
            self.output.append(span.length)

    def report(self) -> dict[str, Any]:
        columns = {
            "unique_tokens": self.unique,
            "longest_path": self.longest_path,
            "longest_context": self.longest_context,
            "output": self.output,
        }
        lengths: dict[str, Any] = {"percentiles": _PERCENTILES}
        for name, values in columns.items():
            lengths[name] = np.percentile(values, _PERCENTILES).astype(int).tolist()
        return {
            "mode": self.mode,
            "examples": len(self.unique),
            "modes": dict(self.modes),
            "answers": sum(self.contexts.values()),
            "answers_per_example": {str(n): self.answers[n] for n in sorted(self.answers)},
            "contexts_per_answer": {str(n): self.contexts[n] for n in sorted(self.contexts)},
            "tokens": {
                "unique": sum(self.unique),
                "unshared": self.unshared,
                "saved": 1 - sum(self.unique) / self.unshared,
                "labelled": self.labelled,
            },
            "cut": {"rows": self.cut_rows, "tokens": self.cut_tokens},
            "notes": {note: {"rows": len(which), "first_row": which[0]} for note, which in self.noted.items()},
            "lengths": lengths,
            "bins": None,
        }

    def cost(self, baseline: Baseline, shape: ModelShape) -> dict[str, Any] | None:
        """Ratios to plain SFT; None if the two train on no common row."""
        if not self.compared_rows:
            return None
        sft_tokens = sum(baseline.tokens[number] for number in self.compared_rows)
        sft_pairs = sum(baseline.pairs[number] for number in self.compared_rows)
        return {
            "tokens": self.compared_tokens / sft_tokens,
            "score_pairs": self.compared_pairs / sft_pairs,
            "model": shape.name,
            "flops": shape.flops(self.compared_tokens, self.compared_pairs) / shape.flops(sft_tokens, sft_pairs),
        }


def _examples(prepared: Dataset) -> Iterator[_Row]:
    """Every example of every prepared row."""
    names = ["labels", "miso_layout", "miso_row", "miso_cut", "miso_notes"]
    for batch in prepared.select_columns(names).with_format("numpy").iter(500):
        for labels, layout, (number,), (cut,), notes in zip(*(batch[name] for name in names), strict=True):
            for i, (example, own_labels) in enumerate(decode_with(layout.tolist(), labels)):
                # What belongs to the row counts once.
                row_cut, row_notes = (int(cut), [str(note) for note in notes]) if i == 0 else (0, [])
                yield _Row(int(number), row_cut, row_notes, example, own_labels)
