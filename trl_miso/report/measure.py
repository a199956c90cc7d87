"""Run samples through a model: standard attention by part of the prompt, and each context's mass under several contexts.

Shapes: L layers, H heads, U tokens of the answer, P parts of the prompt, T tokens, n contexts. Where layers differ in their number
of heads, the missing heads are NaN.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_miso.attention.support import ModelSupport, check_relative
from trl_miso.attention.transformers_attention import skip_logits
from trl_miso.data.collator import MISODataCollator
from trl_miso.evaluation.greedy import greedy_responses
from trl_miso.report.dilution import WEIGHTINGS, equation_6, masses
from trl_miso.report.meters import LayerShares, PartMeter, measuring
from trl_miso.report.prompt_parts import PromptParts
from trl_miso.report.samples import Sample
from trl_miso.segments import encode, parallel, single


@dataclass(frozen=True)
class Measurement:
    """The attention of one sample's answer.

    An answer token is measured where it is predicted: by the query of the token before it.

    Attributes:
        parts: (L, H, P), standard attention by part, mean over the answer. Each `parts[l, h]` sums to 1.
        answer: (U, P), standard attention by part for each answer token, mean over layers and heads.
        alone: For each constraint the standard attention on it where it is the only one in the prompt, before the same answer;
            mean over all layers, heads and answer tokens.
        branches: (L, H, n), sigmoid(l_i - l_out) of each context, mean over the answer; None for a sample with one context.
        output: (L, H), the output's share in that mixture; None for a sample with one context.
        dilution: By number of contexts, the output's share under each weighting and by eq. 6, mean over layers, heads and
            answer (see `_dilution`).
        each: (L, H, U, P), standard attention by part, unreduced. For the sample chosen by `measure(detailed=...)` only.
        tokens: (L, H, T), standard attention by token, mean over the answer. For the same sample only.
    """

    sample: Sample
    parts: np.ndarray
    answer: np.ndarray
    alone: list[float]
    branches: np.ndarray | None
    output: np.ndarray | None
    dilution: dict[int, dict[str, float | None]]
    each: np.ndarray | None = None
    tokens: np.ndarray | None = None


def measure(
    model: PreTrainedModel,
    samples: Iterable[Sample],
    *,
    weighting: str = "uniform",
    output_positions: str = "successive",
    max_length: int | None = None,
    detailed: int | None = None,
) -> Iterator[Measurement]:
    """Measure samples one by one. When the iterator ends, the model's attention and training mode are restored.

    Memory beside the model's own forward: the scores of some queries (`meters.SCORES_AT_ONCE`), and L x H x U x P sums of one
    sample.

    Args:
        weighting: The weighting of the contexts for `branches`; `dilution` has all weightings.
        output_positions: As in `MISOSFTConfig`.
        max_length: The longest sample in tokens, for models whose windows and positions depend on the length.
        detailed: The index of the sample for which `each` and `tokens` are kept.

    Raises:
        ValueError: If MISO does not support the model.
    """
    with measuring(model, max_length) as support:
        if output_positions == "successive":
            check_relative(model.config.model_type, support)
        mixture = Mixture(model, support, output_positions)
        for sample in samples:
            is_detailed = sample.index == detailed
            meter = _run_standard(model, sample.prompted, sample.answer, is_detailed)
            each = _stack(meter.masses)
            alone = []
            for prompted in sample.alone:
                mass = _stack(_run_standard(model, prompted, sample.answer).masses)
                alone.append(float(np.nanmean(mass[..., -1])))  # the constraint is the last part
            branches, output, dilution = None, None, {}
            if len(sample.contexts) > 1:
                share = mixture.shares(sample, sample.weights, weighting)
                mass = masses(share, np.array(sample.weights), weighting)
                branches, output = mass.mean(2), 1 - share.sum(-1).mean(2)
                dilution = _dilution(mixture, sample, mass)
            yield Measurement(
                sample=sample,
                parts=each.mean(2),
                answer=np.nanmean(each, (0, 1)),
                alone=alone,
                branches=branches,
                output=output,
                dilution=dilution,
                each=each if is_detailed else None,
                tokens=_stack(meter.tokens) if is_detailed else None,
            )


def generate_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, max_new_tokens: int
) -> Sample:
    """The sample with the model's own answer: greedy standard inference on the full prompt.

    Args:
        sample: Made by a `Sampler` with `own_answers`.
        max_new_tokens: Limit of the answer, in tokens.
    """
    model.eval()
    (answer,) = greedy_responses(model, tokenizer, [sample.prompted.ids], max_new_tokens)
    return sample.answered(answer, tokenizer.decode(answer, skip_special_tokens=True))


def _run_standard(
    model: PreTrainedModel, prompted: PromptParts, answer: list[int], keep_tokens: bool = False
) -> PartMeter:
    """Run a prompt and its answer as one causal sequence."""
    ids, owners = prompted.ids + answer, prompted.owners + [0] * len(answer)
    meter = PartMeter(
        torch.tensor(owners, device=model.device),
        parts=len(prompted.parts),
        first=len(prompted.ids) - 1,
        keep_tokens=keep_tokens,
    )
    row = {"input_ids": ids, "labels": ids, "miso_layout": encode(single(len(ids)))}
    _forward(model, MISODataCollator(pad_token_id=0), row, miso_meter=meter)
    return meter


@dataclass(frozen=True)
class Mixture:
    """Forwards over several contexts, laid out as in training."""

    model: PreTrainedModel
    support: ModelSupport
    output_positions: str

    def shares(self, sample: Sample, weights: list[float], weighting: str) -> np.ndarray:
        """(L, H, U, n): the shares of the first n = len(weights) contexts."""
        contexts, output = sample.contexts[: len(weights)], sample.head + sample.answer
        tokens, example = parallel(contexts, len(output), weights, self.output_positions)
        row = {"input_ids": tokens + output, "labels": tokens + output, "miso_layout": encode(example)}
        collator = MISODataCollator(0, weighting, self.support.shares, self.support.window)
        queries = torch.arange(len(sample.head) - 1, len(output) - 1, device=self.model.device)
        shares = LayerShares(len(contexts), queries)
        _forward(self.model, collator, row, miso_shares=shares)
        return _stack(shares.layers)

    def supports(self, sample: Sample, weighting: str) -> bool:
        """False for vanilla if the model's window is shorter than the sample: one softmax over all contexts has no windows."""
        return weighting != "vanilla" or not 0 < self.support.window < sample.longest


def _dilution(mixture: Mixture, sample: Sample, mass: np.ndarray) -> dict[int, dict[str, float | None]]:
    """The output's share with the first 1, 2, 4, 8, ... contexts.

    Measured with each weighting (None where the model does not support it), and computed by eq. 6 from `mass` (L, H, U, n), the
    masses in the mixture of all contexts: the share that vanilla would leave with these masses.
    """
    lines: dict[int, dict[str, float | None]] = {}
    n = 1
    while n <= len(sample.contexts):
        line: dict[str, float | None] = {}
        for weighting in WEIGHTINGS:
            if n == 1 and line:  # all weightings agree on one context
                line[weighting] = line[WEIGHTINGS[0]]
            elif not mixture.supports(sample, weighting):
                line[weighting] = None
            else:
                share = mixture.shares(sample, [1 / n] * n, weighting)
                line[weighting] = float(np.nanmean(1 - share.sum(-1)))
        line["equation 6"] = float(np.nanmean(equation_6(mass[..., :n])))
        lines[n] = line
        n *= 2
    return lines


@torch.no_grad()
def _forward(model: PreTrainedModel, collator: MISODataCollator, row: dict[str, list[int]], **meters: Any) -> None:
    batch = collator([row])
    del batch["labels"]
    model(**send_to_device(batch, model.device), use_cache=False, **skip_logits(model), **meters)


def _stack(layers: list[torch.Tensor]) -> np.ndarray:
    """Layers (H, ...) as one array (L, H, ...), padded with NaN to the largest number of heads."""
    most = max(len(layer) for layer in layers)
    stacked = np.full((len(layers), most, *layers[0].shape[1:]), np.nan, dtype=layers[0].numpy().dtype)
    for target, layer in zip(stacked, layers, strict=True):
        target[: len(layer)] = layer.numpy()
    return stacked
