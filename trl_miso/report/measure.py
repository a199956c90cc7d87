"""Samples through a model: standard attention by part of the prompt, and each context's mass under several contexts.

Shapes: L layers, H heads, U tokens of the answer, P parts of the prompt, T tokens, n contexts. Where layers differ in their number
of heads, what is missing is NaN.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_miso.attention.support import ModelSupport, check_relative
from trl_miso.attention.transformers_attention import skip_logits
from trl_miso.data.collator import MISODataCollator
from trl_miso.report.dilution import WEIGHTINGS, equation_6, masses
from trl_miso.report.meters import LayerShares, PartMeter, measuring
from trl_miso.report.prompt_parts import Prompted
from trl_miso.report.samples import Sample
from trl_miso.segments import encode, parallel, single


@dataclass(frozen=True)
class Measurement:
    """What attention did with one sample.

    A token of the answer is measured where it is predicted, by the query of the token before it. All of `parts[l, h]` sum to 1.

    `parts` (L, H, P): standard attention, mean over the answer. `answer` (U, P): the same for each token of the answer, mean over
    layers and heads. `alone`: standard attention on each constraint where it is the only one in the prompt, before the same answer; a
    mean over all. `branches` (L, H, n): sigmoid(l_i - l_out) of each context, mean over the answer; none where there is
    one context. `output` (L, H): the output's share in that mixture. `dilution`: the output's share, mean over layers,
    heads and answer, by number of contexts, for each weighting and for eq. 6 (see `_dilution`).
    `each` (L, H, U, P) and `tokens` (L, H, T) only where they were asked for.
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
    """Measure samples one by one; the model is as it was when the iterator is at its end.

    Memory beside the model's own forward: the scores of some queries (`meters.SCORES`), and L x H x U x P sums of one sample.

    Args:
        weighting: Of the contexts, for `branches`; `dilution` has all of them.
        max_length: Of samples, for windows and positions that depend on the length.
        detailed: The index of the sample whose `each` and `tokens` are kept.

    Raises:
        ValueError: For a model that MISO does not support.
    """
    with measuring(model, max_length) as support:
        if output_positions == "successive":
            check_relative(model.config.model_type, support)
        mixed = _Mixed(model, support, output_positions)
        for sample in samples:
            meter = _standard(model, sample.prompted, sample.answer, sample.index == detailed)
            alone = [_stack(_standard(model, one, sample.answer).masses) for one in sample.alone]
            each = _stack(meter.masses)
            branches, output, dilution = None, None, {}
            if len(sample.contexts) > 1:
                share = mixed.shares(sample, sample.weights, weighting)
                mass = masses(share, np.array(sample.weights), weighting)
                branches, output = mass.mean(2), 1 - share.sum(-1).mean(2)
                dilution = _dilution(mixed, sample, mass)
            yield Measurement(
                sample=sample,
                parts=each.mean(2),
                answer=np.nanmean(each, (0, 1)),
                alone=[float(np.nanmean(mass[..., -1])) for mass in alone],  # the constraint is the last part
                branches=branches,
                output=output,
                dilution=dilution,
                each=each if sample.index == detailed else None,
                tokens=_stack(meter.tokens) if sample.index == detailed else None,
            )


@torch.no_grad()
def answer_by_itself(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample, max_new_tokens: int
) -> Sample:
    """A sample made with `own_answers`, with the model's own answer: standard inference on the full prompt, greedy."""
    ids = torch.tensor([sample.prompted.ids], device=model.device)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, "pad_token_id": pad}
    model.eval()
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    answer = out[0, ids.shape[1] :].tolist()
    return sample.answered(answer, tokenizer.decode(answer, skip_special_tokens=True))


def _standard(model: PreTrainedModel, prompted: Prompted, answer: list[int], tokens: bool = False) -> PartMeter:
    """A prompt and the answer as one causal run."""
    ids, owners = prompted.ids + answer, prompted.owners + [0] * len(answer)
    owner = torch.tensor(owners, device=model.device)
    meter = PartMeter(owner, len(prompted.parts), len(prompted.ids) - 1, tokens)
    row = {"input_ids": ids, "labels": ids, "miso_layout": encode(single(len(ids)))}
    _forward(model, MISODataCollator(pad_token_id=0), row, miso_meter=meter)
    return meter


@dataclass(frozen=True)
class _Mixed:
    """Forwards over several contexts, as training lays them out."""

    model: PreTrainedModel
    support: ModelSupport
    output_positions: str

    def shares(self, sample: Sample, weights: list[float], weighting: str) -> np.ndarray:
        """(L, H, U, n) of the first n = len(weights) contexts."""
        contexts, output = sample.contexts[: len(weights)], sample.head + sample.answer
        tokens, example = parallel(contexts, len(output), weights, self.output_positions)
        row = {"input_ids": tokens + output, "labels": tokens + output, "miso_layout": encode(example)}
        collator = MISODataCollator(0, weighting, self.support.shares, self.support.window)
        queries = torch.arange(len(sample.head) - 1, len(output) - 1, device=self.model.device)
        shares = LayerShares(len(contexts), queries)
        _forward(self.model, collator, row, miso_shares=shares)
        return _stack(shares.layers)

    def honours(self, sample: Sample, weighting: str) -> bool:
        """Whether attention can be mixed so: one softmax over all contexts has no windows that bind."""
        return weighting != "vanilla" or not 0 < self.support.window < sample.longest


def _dilution(mixed: _Mixed, sample: Sample, mass: np.ndarray) -> dict[int, dict[str, float | None]]:
    """The output's share with the first 1, 2, 4, 8, ... contexts: the model run with each weighting; and by eq. 6 from their masses
    in the mixture of all: what vanilla would leave of these."""
    found: dict[int, dict[str, float | None]] = {}
    for n in (2**k for k in range(len(sample.contexts).bit_length())):
        line: dict[str, float | None] = {}
        for weighting in WEIGHTINGS:
            if n == 1 and line:  # of one context all are the same
                line[weighting] = line[WEIGHTINGS[0]]
            elif not mixed.honours(sample, weighting):
                line[weighting] = None
            else:
                line[weighting] = float(np.nanmean(1 - mixed.shares(sample, [1 / n] * n, weighting).sum(-1)))
        line["equation 6"] = float(np.nanmean(equation_6(mass[..., :n])))
        found[n] = line
    return found


@torch.no_grad()
def _forward(model: PreTrainedModel, collator: MISODataCollator, row: dict[str, list[int]], **meters: Any) -> None:
    batch = collator([row])
    del batch["labels"]
    batch = {name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    model(**batch, use_cache=False, **skip_logits(model), **meters)


def _stack(layers: list[torch.Tensor]) -> np.ndarray:
    """Layers of perhaps different numbers of heads, in one array."""
    most = max(len(layer) for layer in layers)
    out = np.full((len(layers), most, *layers[0].shape[1:]), np.nan, dtype=layers[0].numpy().dtype)
    for stacked, layer in zip(out, layers, strict=True):
        stacked[: len(layer)] = layer.numpy()
    return out
