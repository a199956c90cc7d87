"""Training signals that are tried here before any of them becomes a setting of the package.

- `both`: a row's output twice in one batch, mixed and as standard inference sees it, labels on both.
- `distill`: labels on the output as standard inference sees it, and a KL divergence that pulls it towards the mixed output.
- `misses`: a constraint that the model's own answer broke has twice the weight.
- `anneal`: rows are mixed at the beginning of training and plain at its end.
"""

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from trl_miso import MISOSFTTrainer
from trl_miso.data.contexts import parallel_row
from trl_miso.data.layout import columns
from trl_miso.segments import Answer, decode, lay_out


def with_standard(row: dict[str, Any], output_positions: str = "successive") -> dict[str, list[int]]:
    """The prepared columns of a para row with its output a second time, after the full context alone.

    Prefixes are shared: the second output costs its own tokens. All of the first output's labels come before all of the second's
    in a batch.
    """
    (example,) = decode(row["miso_layout"])
    bounds = list(accumulate((segment.length for segment in example.segments), initial=0))
    runs = [row["input_ids"][start:end] for start, end in pairwise(bounds)]
    answers: list[Answer] = []
    for output in example.outputs:
        contexts = []
        for branch in output.branches:
            contexts.append([token for i in example.path(branch.segment) for token in runs[i]])
        weights = [branch.weight for branch in output.branches]
        labels = row["labels"][bounds[output.segment] : bounds[output.segment + 1]]
        answers.append(Answer(contexts, runs[output.segment], labels, weights, output_positions))
    answers += [Answer(answer.contexts[:1], answer.output, answer.labels) for answer in answers]
    return (
        columns(*lay_out(answers)) if answers else {name: row[name] for name in ("input_ids", "labels", "miso_layout")}
    )


class LabelledTrainer(MISOSFTTrainer):
    """TRL's loss, with logits of the labelled tokens alone.

    Where there is no Triton, TRL computes logits of every token. On a CPU that takes a third of a step of para.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        logits, labels = labelled_logits(model, inputs)
        return cross_entropy(logits, labels, reduction="sum") / (num_items_in_batch or len(labels))


def labelled_logits(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (labelled tokens, vocabulary; float32) and labels (labelled tokens) of a batch without padding."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")[0]
    places = (labels != -100).nonzero()[:, 0]
    # A token is predicted from the one before it.
    return model(**inputs, use_cache=False, logits_to_keep=places - 1).logits[0].float(), labels[places]


class BothTrainer(LabelledTrainer):
    """Loss of the mixed and of the standard output, per labelled token of both."""

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        return super()._prepare_dataset(*args, **kwargs).map(with_standard, load_from_cache_file=False)


class DistillTrainer(BothTrainer):
    """`CE(standard) + KL(mixed || standard)` per labelled token of the standard output; no gradient through the mixed output.

    Every row must be mixed (`para_prob=1`, two contexts or more).
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        logits, labels = labelled_logits(model, inputs)
        mixed, standard = labels.chunk(2)
        if not torch.equal(mixed, standard):
            raise ValueError("Got rows that are not mixed, expected two contexts in each. Fix: leave them out.")
        teacher, student = (log_softmax(part, -1) for part in logits.chunk(2))
        count = len(standard) if num_items_in_batch is None else num_items_in_batch / 2
        divergence = kl_div(student, teacher.detach(), log_target=True, reduction="sum")
        return (cross_entropy(logits.chunk(2)[1], standard, reduction="sum") + divergence) / count


def weighted_by_misses(row: dict[str, Any], followed: Sequence[bool]) -> dict[str, Any]:
    """The row with column `contexts` and weights: 2 for a constraint that the model's own answer broke, 1 for all else, scaled."""
    parallel = parallel_row(row, "constraints")
    weights = [1.0] * len(parallel.contexts)
    for i, name in enumerate(parallel.names):
        kind, _, number = name.partition(" ")
        if kind == "constraint" and not followed[int(number) - 1]:
            weights[i] = 2.0
    return {
        "contexts": parallel.contexts,
        "completion": row["completion"],
        "context_weights": [weight / sum(weights) for weight in weights],
    }


def annealed(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The rows in order, row i of n plain with probability i / n: its full prompt, without constraints to make contexts from."""
    rng = random.Random(seed)
    presented = []
    for i, row in enumerate(rows):
        if rng.random() < i / len(rows):
            row = row | {"prompt": parallel_row(row, "constraints").contexts[0], "constraints": []}
        presented.append(row)
    return presented
