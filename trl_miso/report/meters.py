"""Measure attention during a forward, without keeping any attention matrix.

Shapes: U queries that predict the answer, T tokens, P parts, Q branch rows, H query heads, G key-value heads, R query heads per
key-value head, B queries of one block, D head dimension.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trl_miso.attention.shares import Shares
from trl_miso.attention.state import restore_attention
from trl_miso.attention.support import ModelSupport, prepare_model
from trl_miso.attention.transformers_attention import (
    base_implementation,
    compute_dtype,
    register_over,
    score_scale,
)

# Heads x queries x keys scored at once: 32 MB in float32, and as much again for their softmax.
SCORES_AT_ONCE = 8_000_000


class PartMeter:
    """Collects, for each layer, how the queries' attention divides over the parts of one causal sequence.

    Passed to the model as the keyword argument `miso_meter`. For each layer it equals the causal softmax of the scores, summed
    over the keys of each part: `exp(lse_part - lse_all)`. Scores are computed in blocks of queries, `SCORES_AT_ONCE` scores per
    block (at least one query), in float32 or wider; only their sums are kept.

    Args:
        owners: (T,), the part of each token.
        parts: Number of parts.
        first: The first query. Every later token is a query too, except the last one, which predicts nothing.
        keep_tokens: Whether to keep the mass of each key too.

    Attributes:
        masses: For each layer (H, U, P).
        tokens: For each layer (H, T), mean over the queries; empty without `keep_tokens`.
    """

    def __init__(self, owners: torch.Tensor, parts: int, first: int, keep_tokens: bool = False):
        self._owners, self._parts = owners, parts
        self._queries = range(first, len(owners) - 1)
        self._keep_tokens = keep_tokens
        self.masses: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []

    def read(
        self, query: torch.Tensor, key: torch.Tensor, scale: float, window: int | None, softcap: float | None
    ) -> None:
        """Add a layer with queries (1, H, T, D) and keys (1, G, T, D)."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        heads, length = query.shape[1], query.shape[2]
        k_GTD = key[0].to(dtype)
        part_TP = torch.nn.functional.one_hot(self._owners, self._parts).to(dtype)
        mass_HUP = query.new_zeros(heads, len(self._queries), self._parts, dtype=dtype)
        total_HT = query.new_zeros(heads, length, dtype=dtype)
        position_T = torch.arange(length, device=query.device)
        block = max(1, SCORES_AT_ONCE // (heads * length))
        for start in range(0, len(self._queries), block):
            queries = self._queries[start : start + block]
            row_B = position_T[queries.start : queries.stop]
            # Scores of a block of queries, with the grouped heads' keys shared instead of repeated.
            q_GRBD = query[0, :, row_B].to(dtype).unflatten(0, (len(k_GTD), -1))
            score_HBT = torch.einsum("grqd,gkd->grqk", q_GRBD, k_GTD).flatten(0, 1).mul_(scale)
            if softcap:
                score_HBT = score_HBT.div_(softcap).tanh_().mul_(softcap)
            # A key is visible if it is not later than the query and within the window.
            distance_BT = row_B[:, None] - position_T
            score_HBT.masked_fill_((distance_BT < 0) | (distance_BT >= (window or length)), -torch.inf)
            probability_HBT = score_HBT.softmax(-1)
            mass_HUP[:, start : start + block] = probability_HBT @ part_TP
            if self._keep_tokens:
                total_HT += probability_HBT.sum(1)
        self.masses.append(mass_HUP.cpu())
        if self._keep_tokens:
            self.tokens.append((total_HT / len(self._queries)).cpu())


class LayerShares(Shares):
    """Collects, for each layer, the shares of one example's contexts per head and query.

    Passed to the model as the keyword argument `miso_shares`.

    Args:
        branches: Number of contexts.
        queries: (U,), the rows of the output that predict the answer.

    Attributes:
        layers: For each layer (H, U, n).
    """

    def __init__(self, branches: int, queries: torch.Tensor):
        super().__init__()
        self._branches, self._queries = branches, queries
        self.layers: list[torch.Tensor] = []

    def add(self, share_QH: torch.Tensor) -> None:
        share_nUH = share_QH.detach().unflatten(0, (self._branches, -1))[:, self._queries]
        self.layers.append(share_nUH.permute(2, 1, 0).cpu())


@contextmanager
def measuring(model: PreTrainedModel, max_length: int | None) -> Iterator[ModelSupport]:
    """Put the model in evaluation mode with attention that can be measured; on exit, restore both.

    Raises:
        ValueError: If MISO does not support the model.
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
    """The attention of training; first measured if the forward has a meter."""
    if miso_meter is not None:
        dtype = compute_dtype(value)
        with torch.autocast(query.device.type, enabled=False):
            scale = score_scale(query, kwargs.get("scaling"))
            miso_meter.read(
                query.to(dtype),
                key.to(dtype),
                scale,
                window=kwargs.get("sliding_window"),
                softcap=kwargs.get("softcap"),
            )
    return trained(module, query, key, value, attention_mask, **kwargs)
