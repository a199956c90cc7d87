"""Each context's share of the outputs' attention: a by-product of mixing, collected layer by layer."""

import torch

from trl_miso.segments.packed import PackedSegments


class Shares:
    """Passed as the model's keyword argument `miso_shares`: attention adds each layer's shares of one batch.

    A context's share of an output token's attention is `w_i sigmoid(l_i - l_out)` for fixed weights (paper, eq. 3), and its part of
    the one softmax for fid and vanilla (eqs. 7 and 4). The rest is the output's own share (eqs. 5 and 6). Recomputed layers add
    their shares twice, which changes no mean. Not a dataclass: FSDP hands copies of dataclasses to the layers.

    Args:
        packed: Metadata of the batch. None, or without contexts to mix: there is nothing to collect.

    Shapes: Q branch rows, H query heads.
    """

    def __init__(self, packed: PackedSegments | None = None) -> None:
        self._packed = packed
        if packed is not None and packed.branch_q_index is not None:
            # `add` changes these tensors in place, because a compiled layer that is recomputed cannot set an attribute.
            self._sum_Q = torch.zeros_like(packed.branch_q_index, dtype=torch.float32)
            self._layers = torch.zeros((), device=self._sum_Q.device)

    def add(self, share_QH: torch.Tensor) -> None:
        """Add a layer's shares, one per branch row and head."""
        self._sum_Q.add_(share_QH.detach().mean(1, dtype=torch.float32).to(self._sum_Q.device))
        self._layers.add_(1)

    def means(self) -> dict[str, float]:
        """Mean shares of the batch; empty if it mixes nothing.

        Each output's and context's share is first averaged over layers, heads and the tokens of its output.

        Returns:
            `output_share`: mean over outputs of the output's own share. `context_share`: mean over contexts.
            `min_context_share`: smallest share of a context.
        """
        packed = self._packed
        if packed is None or packed.branch_cu_seqlens_q is None:
            return {}
        share_Q = self._sum_Q / self._layers
        # Mean over the tokens of each branch: the branch rows of one branch are consecutive.
        lengths = packed.branch_cu_seqlens_q.diff()
        branch_Q = torch.repeat_interleave(lengths, output_size=len(share_Q))
        contexts = share_Q.new_zeros(len(lengths)).index_add_(0, branch_Q, share_Q) / lengths
        # An output's own share is 1 minus the sum over its contexts.
        output = 1 - contexts.sum() / packed.num_outputs
        names = "output_share", "context_share", "min_context_share"
        return dict(zip(names, torch.stack([output, contexts.mean(), contexts.min()]).tolist(), strict=True))
