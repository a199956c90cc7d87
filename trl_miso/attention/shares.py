"""How much of the outputs' attention goes to each context: a by-product of mixing, collected layer by layer."""

import torch

from trl_miso.segments.packed import PackedSegments


class Shares:
    """Passed as the model's keyword argument `miso_shares`: attention adds each layer's shares of one batch.

    A context's share of an output token's attention is `w_i sigmoid(l_i - l_out)` for fixed weights (paper, eq. 3), its part of
    the one softmax for fid and vanilla (eqs. 7 and 4); what the contexts leave is the output's own (eqs. 5 and 6). Recomputed layers
    add theirs again, which changes no mean. Not a dataclass: FSDP hands copies of those to the layers.
    """

    def __init__(self) -> None:
        self._sum_Q: torch.Tensor | None = None
        self._layers = 0

    def add(self, share_QH: torch.Tensor) -> None:
        """A layer's shares, one for each branch row and head."""
        mean_Q = share_QH.detach().mean(1, dtype=torch.float32)
        self._sum_Q = mean_Q if self._sum_Q is None else self._sum_Q + mean_Q.to(self._sum_Q.device)
        self._layers += 1

    def means(self, packed: PackedSegments | None) -> dict[str, float]:
        """Of means over layers, heads and an output's tokens, the mean over the batch's outputs and over its contexts; empty if
        attention added nothing.

        `output_share`: of the output itself. `context_share`: of a context. `min_context_share`: of the smallest context.
        """
        if self._sum_Q is None:
            return {}
        share_Q = self._sum_Q / self._layers
        assert packed is not None and packed.branch_cu_seqlens_q is not None
        lengths = packed.branch_cu_seqlens_q.diff()
        context = torch.repeat_interleave(lengths, output_size=len(share_Q))
        contexts = share_Q.new_zeros(len(lengths)).index_add_(0, context, share_Q) / lengths
        output = 1 - contexts.sum() / packed.num_mixed
        found = torch.stack([output, contexts.mean(), contexts.min()]).tolist()
        return dict(zip(("output_share", "context_share", "min_context_share"), found, strict=True))
