"""Statistics of prepared rows, and what a step on them costs."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from trl_miso.attention.support import head_dim
from trl_miso.segments import Example, decode, single, unshare

_PERCENTILES = [0, 5, 25, 50, 75, 95, 100]


@dataclass(frozen=True)
class ModelShape:
    """What a model's compute depends on: `weights` that every token meets, and `width` of attention, summed over layers."""

    name: str
    weights: int
    width: int

    @classmethod
    def of(cls, config: PreTrainedConfig, name: str) -> "ModelShape":
        """From a config alone. All experts of a mixture of experts are counted, which understates attention's share."""
        model = meta_model(config)
        text = config.get_text_config()
        head = model.get_output_embeddings()
        embedding = model.get_input_embeddings().weight
        tied = head is not None and head.weight is embedding
        weights = sum(p.numel() for p in model.parameters()) - (0 if tied else embedding.numel())
        return cls(name, weights, text.num_hidden_layers * text.num_attention_heads * head_dim(text))

    def flops(self, tokens: int, score_pairs: int) -> int:
        """Of a forward pass: a multiplication and an addition a weight and token, and as many for QK and PV a pair."""
        return 2 * self.weights * tokens + 4 * self.width * score_pairs


@dataclass(frozen=True)
class Baseline:
    """Tokens and score pairs of plain SFT on the full prompts, by raw row; without rows that it would drop."""

    tokens: dict[int, int]
    pairs: dict[int, int]

    @classmethod
    def of(cls, prepared: Dataset, max_length: int | None = None) -> "Baseline":
        """From rows prepared in single mode, which are to be cut to `max_length` if it is given."""
        tokens, pairs = Counter[int](), Counter[int]()
        for number, _, example, labels in _examples(prepared):
            if max_length is not None:
                if (labels[:max_length] == -100).all():
                    continue
                example = single(min(example.num_tokens, max_length))
            tokens[number] += example.num_tokens
            pairs[number] += score_pairs(example)
        return cls(tokens, pairs)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without its weights, which takes no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def score_pairs(example: Example) -> int:
    """Query-key pairs that attention scores: each segment with its path, causal in itself, the output with every path."""
    lengths = [segment.length for segment in example.segments]
    within = sum(length * (length + 1) // 2 for length in lengths)
    ahead = sum(n * sum(lengths[s] for s in example.path(i)[:-1]) for i, n in enumerate(lengths))
    mixed = sum(lengths[-1] * lengths[s] for branch in example.branches for s in example.path(branch.segment))
    return within + ahead + mixed


def dataset_statistics(
    prepared: Dataset, mode: str, baseline: Baseline, shape: ModelShape, shared: bool
) -> dict[str, Any]:
    """Counts over a whole prepared data set; see `preview_dataset`.

    Args:
        mode: That the rows were prepared in.
        baseline: Of the same rows, what cost is compared with, over the rows that both train on.
        shared: Whether common prefixes are computed once.
    """
    modes, contexts, total, compared = Counter[str](), Counter[int](), Counter[str](), set[int]()
    unique, longest, outputs = [], [], []
    for number, cut, example, labels in _examples(prepared):
        mixes, labelled = bool(example.branches), int((labels != -100).sum())
        modes[mode if mixes or mode == "augment" else "single"] += 1
        contexts[max(1, len(example.branches))] += 1
        laid_out = example if shared else unshare(example, [])[0]
        unique.append(laid_out.num_tokens)
        output = example.segments[-1].length if mixes else labelled
        outputs.append(output)
        paths = [example.path(branch.segment) for branch in example.branches]
        longest.append(
            max((sum(example.segments[s].length for s in path) for path in paths), default=example.num_tokens - output)
        )
        if number in baseline.tokens:
            compared.add(number)
            total["compared_tokens"] += laid_out.num_tokens
            total["compared_pairs"] += score_pairs(laid_out)
        for name, value in (
            ("unshared", example.num_unshared_tokens),
            ("labelled", labelled),
            ("cut_rows", cut > 0),
            ("cut", cut),
        ):
            total[name] += value
    cost: dict[str, Any] | None = None
    if compared:
        own = total["compared_tokens"], total["compared_pairs"]
        sft = sum(baseline.tokens[n] for n in compared), sum(baseline.pairs[n] for n in compared)
        cost = {"tokens": own[0] / sft[0], "score_pairs": own[1] / sft[1], "model": shape.name}
        cost["flops"] = shape.flops(*own) / shape.flops(*sft)
    columns = {"unique_tokens": unique, "longest_context": longest, "output": outputs}
    lengths = {name: np.percentile(values, _PERCENTILES).astype(int).tolist() for name, values in columns.items()}
    return {
        "mode": mode,
        "examples": len(unique),
        "modes": dict(modes),
        "contexts_per_example": {str(n): contexts[n] for n in sorted(contexts)},
        "tokens": {
            "unique": sum(unique),
            "unshared": total["unshared"],
            "saved": 1 - sum(unique) / total["unshared"],
            "labelled": total["labelled"],
        },
        "cut": {"rows": total["cut_rows"], "tokens": total["cut"]},
        "lengths": {"percentiles": _PERCENTILES} | lengths,
        "bins": None,
        "cost": cost,
    }


def _examples(prepared: Dataset) -> Iterator[tuple[int, int, Example, np.ndarray]]:
    """(raw row, tokens cut, example, its labels) of every example."""
    for batch in (
        prepared.select_columns(["labels", "miso_layout", "miso_row", "miso_cut"]).with_format("numpy").iter(500)
    ):
        columns = (batch[name] for name in ("labels", "miso_layout", "miso_row", "miso_cut"))
        for labels, layout, (number,), (cut,) in zip(*columns, strict=True):
            at = 0
            for i, example in enumerate(decode(layout.tolist())):
                own = labels[at : at + example.num_tokens]
                at += example.num_tokens
                yield int(number), int(cut) if i == 0 else 0, example, own
