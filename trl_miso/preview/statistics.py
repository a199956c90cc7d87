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
from trl_miso.packing import plan_bins
from trl_miso.segments import Example, decode, unshare

_PERCENTILES = [0, 5, 25, 50, 75, 95, 100]
_PLANNED = 1000  # rows that packing plans at once: the batch size of `Dataset.map`


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
    """Tokens and score pairs of plain SFT on the full prompts, by raw row."""

    tokens: dict[int, int]
    pairs: dict[int, int]

    @classmethod
    def of(cls, prepared: Dataset) -> "Baseline":
        tokens, pairs = Counter[int](), Counter[int]()
        for number, _, example, _ in _examples(prepared):
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


def statistics_of(
    prepared: Dataset, mode: str, baseline: Baseline, shape: ModelShape, bin_size: int | None, shared: bool
) -> dict[str, Any]:
    """Counts over a whole prepared data set; see `preview_dataset`.

    Args:
        mode: That the rows were prepared in.
        baseline: Of the same rows, what cost is compared with.
        bin_size: Tokens a bin, if rows are packed.
        shared: Whether common prefixes are computed once.
    """
    modes, contexts, total, numbers = Counter[str](), Counter[int](), Counter[str](), set[int]()
    unique, longest, outputs = [], [], []
    for number, cut, example, labelled in _examples(prepared):
        mixes = bool(example.branches)
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
        numbers.add(number)
        for name, value in (
            ("unshared", example.num_unshared_tokens),
            ("labelled", labelled),
            ("cut_rows", cut > 0),
            ("cut", cut),
            ("pairs", score_pairs(laid_out)),
        ):
            total[name] += value
    tokens, pairs = sum(unique), total["pairs"]
    sft = sum(baseline.tokens.get(n, 0) for n in numbers), sum(baseline.pairs.get(n, 0) for n in numbers)
    cost = None
    if all(sft):
        cost = {"tokens": tokens / sft[0], "score_pairs": pairs / sft[1], "model": shape.name}
        cost["flops"] = shape.flops(tokens, pairs) / shape.flops(*sft)
    columns = {"unique_tokens": unique, "longest_context": longest, "output": outputs}
    lengths = {name: np.percentile(values, _PERCENTILES).astype(int).tolist() for name, values in columns.items()}
    return {
        "mode": mode,
        "examples": len(unique),
        "modes": dict(modes),
        "contexts_per_example": {str(n): contexts[n] for n in sorted(contexts)},
        "tokens": {
            "unique": tokens,
            "unshared": total["unshared"],
            "saved": 1 - tokens / total["unshared"],
            "labelled": total["labelled"],
        },
        "cut": {"rows": total["cut_rows"], "tokens": total["cut"]},
        "lengths": {"percentiles": _PERCENTILES} | lengths,
        "bins": _bins(unique, bin_size) if bin_size else None,
        "cost": cost,
    }


def _bins(sizes: list[int], bin_size: int) -> dict[str, Any]:
    planned = (plan_bins(sizes[at : at + _PLANNED], bin_size) for at in range(0, len(sizes), _PLANNED))
    bins = sum(map(len, planned))
    filled = sum(sizes) / (bins * bin_size)
    return {"max_length": bin_size, "bins": bins, "filled": filled, "examples_per_bin": round(len(sizes) / bins, 1)}


def _examples(prepared: Dataset) -> Iterator[tuple[int, int, Example, int]]:
    """(raw row, tokens cut, example, labelled tokens) of every example."""
    for batch in (
        prepared.select_columns(["labels", "miso_layout", "miso_row", "miso_cut"]).with_format("numpy").iter(500)
    ):
        columns = (batch[name] for name in ("labels", "miso_layout", "miso_row", "miso_cut"))
        for labels, layout, (number,), (cut,) in zip(*columns, strict=True):
            at = 0
            for i, example in enumerate(decode(layout.tolist())):
                own = labels[at : at + example.num_tokens]
                at += example.num_tokens
                yield int(number), int(cut) if i == 0 else 0, example, int((own != -100).sum())
