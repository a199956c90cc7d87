"""The interface of raw variable-length attention kernels.

    forward(q, k, v, call, options) -> out (T, H, D), lse (H, T)
    backward(dout, q, k, v, out, lse, call, options) -> dq, dk, dv

`call` delimits sequences in q (T, H, D) and k, v (S, G, D); `options` has scale, causality (bottom-right aligned: the last
query sees the last key), window and softcap. The log-sum-exp is float32 (float64 for float64 inputs). `backward`
recomputes P = exp(scores - lse) and dS = P * (dout v^T - rowsum(dout * out)) from the (out, lse) that it is *given*. This
is what makes the mixture's gradient exact (`mixture.py`). Every sequence has at least one query and one key.

Shapes: T query rows, S key rows, H query heads, G key-value heads, D head dimension, Lq and Lk rows of one sequence.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from trl_miso.segments.packed import Varlen


@dataclass(frozen=True)
class KernelOptions:
    """Options of one kernel call.

    Args:
        scale: Factor of the scores.
        causal: The last query is aligned with the last key.
        window: Number of keys that a query sees, itself included; 0 for all.
        softcap: c > 0 makes the scores `c tanh(s / c)`; 0 for none.
    """

    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0

    def without_causality(self) -> "KernelOptions":
        """Every query sees all keys."""
        return KernelOptions(self.scale, causal=False, window=0, softcap=self.softcap)


class Kernel(Protocol):
    """Raw variable-length attention, see the module's docstring."""

    name: str

    def refuses(self, device: torch.device, dtype: torch.dtype, head_dim: int, options: KernelOptions) -> str | None:
        """Why the kernel cannot run; None if it can."""
        ...

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Varlen, options: KernelOptions
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: Varlen,
        options: KernelOptions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...
