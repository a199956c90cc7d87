"""The literal execution of MISO on a transformers model: one row per context, each with its own copy of the output.

Row i is context i followed by the output, at positions 0, 1, 2, ...; in every layer the attention outputs of the copies of an
output token are replaced by their weighted mixture. No packing, no shared prefix, no rotation, no log-sum-exp merge.
"""

from collections.abc import Iterator
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from trl_miso.segments import decode

NAME = "rows_oracle"


class Parts(NamedTuple):
    """What one example of a prepared row consists of; a single causal run is the output of one empty context."""

    contexts: list[list[int]]
    output: list[int]
    labels: list[int]
    weights: list[float]


def parts_of(row) -> Iterator[Parts]:
    """What a prepared row (`input_ids`, `labels`, `miso_layout`) trains: each output, and each segment with labels."""
    return chain.from_iterable(examples_of(row))


def examples_of(row) -> Iterator[list[Parts]]:
    """`parts_of` by example: a bin has several."""
    at = 0
    for example in decode(row["miso_layout"]):
        parts = []
        bounds = list(accumulate((s.length for s in example.segments), initial=at))
        runs = [row["input_ids"][start:end] for start, end in pairwise(bounds)]
        labels = [row["labels"][start:end] for start, end in pairwise(bounds)]
        at = bounds[-1]
        for output in example.outputs:
            contexts = [list(chain.from_iterable(runs[i] for i in example.path(b.segment))) for b in output.branches]
            weights = [b.weight for b in output.branches]
            parts.append(Parts(contexts, runs[output.segment], labels[output.segment], weights))
        outputs = {output.segment for output in example.outputs}
        for s in range(len(runs)):
            if s not in outputs and any(label != -100 for label in labels[s]):
                before = list(chain.from_iterable(runs[i] for i in example.path(s)[:-1]))
                parts.append(Parts([[]], before + runs[s], [-100] * len(before) + labels[s], [1.0]))
        yield parts
    assert at == len(row["input_ids"]) == len(row["labels"])


def positions_of(contexts, output, where):
    """Positions of each row. `where` is `"successive"`; `"after_longest"`: the output after the longest context; `"chunks"`:
    contexts are chunks of one input, at the positions that they have in it, and the output after all of them."""
    lengths = list(map(len, contexts))
    starts = list(accumulate(lengths[:-1], initial=0)) if where == "chunks" else [0] * len(lengths)
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    begin = ends if where == "successive" else [max(ends)] * len(ends)
    spans = zip(starts, ends, begin, strict=True)
    return [[*range(start, end), *range(first, first + len(output))] for start, end, first in spans]


def rows_logits(model, contexts, output, weights, weighting="uniform", positions=None):
    """Logits at the tokens of the output, all but the last, by one-row-per-context execution."""
    lengths = [len(context) for context in contexts]
    width = max(lengths) + len(output)
    ids = torch.zeros(len(contexts), width, dtype=torch.long)
    at = torch.zeros_like(ids)
    positions = positions or positions_of(contexts, output, "successive")
    for i, context in enumerate(contexts):
        ids[i, : lengths[i] + len(output)] = torch.tensor([*context, *output])
        at[i, : lengths[i] + len(output)] = torch.tensor(positions[i])
    model.set_attn_implementation(NAME)
    logits = model(
        input_ids=ids,
        position_ids=at,
        use_cache=False,
        oracle_lengths=lengths,
        oracle_output=len(output),
        oracle_weights=weights,
        oracle_weighting=weighting,
    ).logits
    return logits[0, lengths[0] : lengths[0] + len(output) - 1]


def rows_loss(model, contexts, output, labels, weights, weighting="uniform", positions=None):
    """Summed negative log-likelihood of the labels (-100: none) of one example, by one-row-per-context execution."""
    predicted = rows_logits(model, contexts, output, weights, weighting, positions)
    return torch.nn.functional.cross_entropy(
        predicted.double(), torch.tensor(labels[1:], dtype=torch.long), ignore_index=-100, reduction="sum"
    )


def trainer_by_rows(trainer, rows):
    """A trainer's loss on prepared rows, the gradients by name, and how many outputs have several contexts."""
    weighting, model = trainer.args.context_weighting, trainer.model
    implementation = model.config._attn_implementation
    model.zero_grad()
    total, count, mixed = torch.zeros((), dtype=torch.float64), 0, 0
    for row in rows:
        for contexts, output, labels, weights in parts_of(row):
            where = "chunks" if trainer.training_mode == "succ" else trainer.args.output_positions
            positions = positions_of(contexts, output, where if len(contexts) > 1 else "successive")
            total = total + rows_loss(model, contexts, output, labels, weights, weighting, positions)
            count += sum(label != -100 for label in labels[1:])
            mixed += len(contexts) > 1
    loss = total / count
    loss.backward()
    model.set_attn_implementation(implementation)
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}, mixed


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, sliding_window=None, **kwargs):
    lengths, size = kwargs["oracle_lengths"], kwargs["oracle_output"]
    weights, weighting = kwargs["oracle_weights"], kwargs["oracle_weighting"]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    width = query.shape[2]
    distance = torch.arange(width)[:, None] - torch.arange(width)
    hidden = (distance < 0) | (distance >= (sliding_window or width))
    scores = scores.masked_fill(hidden, -torch.inf).double()
    attended = scores.softmax(-1) @ value.double()
    spans = [slice(length, length + size) for length in lengths]
    branches = torch.stack([attended[i, :, span] for i, span in enumerate(spans)])
    if weighting == "fid":
        share = torch.stack([scores[i, :, s].logsumexp(-1) for i, s in enumerate(spans)]).softmax(0)[..., None]
    else:
        share = torch.tensor(weights, dtype=torch.float64)[:, None, None, None]
    mixed = (share * branches).sum(0)
    if weighting == "vanilla":
        own = scores[0, :, spans[0], spans[0]]
        to_context = [scores[i, :, span, : lengths[i]] for i, span in enumerate(spans)]
        values = [value[i, :, : lengths[i]] for i in range(len(lengths))] + [value[0, :, spans[0]]]
        mixed = torch.cat([*to_context, own], -1).softmax(-1) @ torch.cat(values, 1).double()
    rows = []
    for i, span in enumerate(spans):
        rows.append(torch.cat([attended[i, :, : span.start], mixed, attended[i, :, span.stop :]], dim=1))
    return torch.stack(rows).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda **kwargs: None)
