"""Attention that is measured on its way: what a forward tells beside its output, without keeping any attention matrix.

Shapes: U queries that predict the answer, T tokens, P parts, Q branch rows, H query heads, G key-value heads, D head dimension.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trl_miso.attention.shares import Shares
from trl_miso.attention.support import ModelSupport, prepare_model
from trl_miso.attention.transformers_attention import (
    base_implementation,
    compute_dtype,
    register_over,
    restore_attention,
    score_scale,
)

SCORES = (
    8_000_000  # heads x queries x keys that are scored at a time: 32 MB in float32, and as much again for their softmax
)


class PartMeter:
    """Passed as the model's keyword argument `miso_meter`: how the queries' attention divides over the parts of one causal run.

    Equals, for each layer, the causal softmax of the scores summed over the keys of each part, `exp(lse_part - lse_all)`; in float32
    at least. It is computed for `SCORES` scores at a time (or one query's, if they are more), of which only sums are kept.

    Args:
        owners: (T,), the part of each token.
        parts: How many there are.
        first: The first query; all tokens from it on are queries but the last, from which nothing is predicted.
        tokens: Whether to keep each key's mass too.
    """

    def __init__(self, owners: torch.Tensor, parts: int, first: int, tokens: bool = False):
        self._owners, self._parts = owners, parts
        self._queries = range(first, len(owners) - 1)
        self._tokens = tokens
        self.masses: list[torch.Tensor] = []  # of each layer (H, U, P)
        self.tokens: list[torch.Tensor] = []  # of each layer (H, T), the mean over the queries

    def read(
        self, query: torch.Tensor, key: torch.Tensor, scale: float, window: int | None, softcap: float | None
    ) -> None:
        """A layer's queries (1, H, T, D) and keys (1, G, T, D)."""
        wide = torch.promote_types(query.dtype, torch.float32)
        heads, length = query.shape[1], query.shape[2]
        k_GTD = key[0].to(wide)
        mass = query.new_zeros(heads, len(self._queries), self._parts, dtype=wide)
        total = query.new_zeros(heads, length, dtype=wide)
        of_part = torch.nn.functional.one_hot(self._owners, self._parts).to(wide)  # (T, P)
        at_once = max(1, SCORES // (heads * length))
        position = torch.arange(length, device=query.device)
        for start in range(0, len(self._queries), at_once):
            rows = position[
                self._queries.start + start : min(self._queries.start + start + at_once, self._queries.stop)
            ]
            q = query[0, :, rows].to(wide).unflatten(0, (len(k_GTD), -1))
            scores = torch.einsum("grqd,gkd->grqk", q, k_GTD).flatten(0, 1).mul_(scale)
            if softcap:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            distance = rows[:, None] - position
            scores.masked_fill_((distance < 0) | (distance >= (window or length)), -torch.inf)
            probabilities = scores.softmax(-1)
            mass[:, start : start + at_once] = probabilities @ of_part
            if self._tokens:
                total += probabilities.sum(1)
        self.masses.append(mass.cpu())
        if self._tokens:
            self.tokens.append((total / len(self._queries)).cpu())


class LayerShares(Shares):
    """Passed as the model's keyword argument `miso_shares`: each layer's shares of one example's contexts, for each head and query.

    Args:
        branches: How many contexts there are.
        queries: (U,), the output's rows that predict the answer.
    """

    def __init__(self, branches: int, queries: torch.Tensor):
        super().__init__()
        self._branches, self._queries = branches, queries
        self.layers: list[torch.Tensor] = []  # (H, U, n)

    def add(self, share_QH: torch.Tensor) -> None:
        share = share_QH.detach().unflatten(0, (self._branches, -1))[:, self._queries]
        self.layers.append(share.permute(2, 1, 0).cpu())


@contextmanager
def measuring(model: PreTrainedModel, max_length: int | None) -> Iterator[ModelSupport]:
    """The model in evaluation mode with attention that can be measured; afterwards as it was.

    Raises:
        ValueError: If the model is not one that MISO supports.
    """
    base = base_implementation(model.config.get_text_config()._attn_implementation)
    with restore_attention(model):
        support = prepare_model(model, register_over(base, "measured", _attention_forward), max_length)
        model.eval()
        yield support


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    trained: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    miso_meter: PartMeter | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of training, measured if there is a meter."""
    if miso_meter is not None:
        dtype = compute_dtype(value)
        with torch.autocast(query.device.type, enabled=False):
            scale = score_scale(query, kwargs.get("scaling"))
            limits = kwargs.get("sliding_window"), kwargs.get("softcap")
            miso_meter.read(query.to(dtype), key.to(dtype), scale, *limits)
    return trained(module, query, key, value, attention_mask, **kwargs)
