"""The oracle: MISO attention from its definition, densely, in any dtype, with autograd's own gradients.

Shares nothing with `mixture.py`, `kernels.py` or the packing: no log-sum-exp merge, no varlen call, no index tensors.
"""

from collections.abc import Callable

import torch

from trl_miso.segments import Example


def reference_attention(
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    example: Example,
    weighting: str,
    scale: float,
    rotation: Callable[..., torch.Tensor] | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention of one example whose T tokens are in its own segment order: `sum_i w_i softmax([S_i, S_out]) [V_i; V_out]`.

    Args:
        q_THD: (T, H, D). k_TGD, v_TGD: (T, G, D).
        weighting: `"uniform"` (the branches' own weights), `"fid"` or `"vanilla"`.
        rotation: See `mixture.Rotation`; applied to the output's queries.
        window: Keys a query sees, itself included, counted along context then output; 0: all.
    """
    repeats = q_THD.shape[1] // k_TGD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(repeats, dim=1) for x in (k_TGD, v_TGD))
    starts = [sum(s.length for s in example.segments[:i]) for i in range(len(example.segments))]
    tokens = [range(start, start + s.length) for start, s in zip(starts, example.segments, strict=True)]

    def scores(queries: list[int], keys: list[int], offset: int = 0) -> torch.Tensor:
        """(H, queries, keys): causal along `keys`, which ends with the queries, or not causal if they are not in it."""
        q = q_THD[queries]
        if offset:
            assert rotation is not None, "an example with query offsets needs a rotation"
            q = rotation(q, torch.full((len(queries),), abs(offset)), abs(offset) + 1, inverse=offset < 0)
        s = torch.einsum("qhd,khd->hqk", q, k_THD[keys]) * scale
        return softcap * torch.tanh(s / softcap) if softcap else s

    def visible(n_queries: int, n_keys: int) -> torch.Tensor:
        distance = torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)
        return (distance >= 0) & (distance < (window or n_keys + 1))

    out = torch.empty_like(q_THD)
    last = len(example.segments) - 1
    for i in range(last if example.branches else last + 1):
        path = [t for j in example.path(i) for t in tokens[j]]
        s = scores(list(tokens[i]), path).masked_fill(~visible(len(tokens[i]), len(path)), -torch.inf)
        out[list(tokens[i])] = torch.einsum("hqk,khd->qhd", s.softmax(-1), v_THD[path])
    if not example.branches:
        return out

    output = list(tokens[last])
    own = scores(output, output).masked_fill(~visible(len(output), len(output)), -torch.inf)
    contexts = [[t for j in example.path(b.segment) for t in tokens[j]] for b in example.branches]
    to_context = [scores(output, c, b.offset) for c, b in zip(contexts, example.branches, strict=True)]
    if weighting == "vanilla":
        keys = [t for context in contexts for t in context] + output
        out[output] = torch.einsum("hqk,khd->qhd", torch.cat([*to_context, own], -1).softmax(-1), v_THD[keys])
        return out
    branches = []
    for context, s in zip(contexts, to_context, strict=True):
        seen = visible(len(output), len(context) + len(output))
        branches.append(torch.cat([s, own], -1).masked_fill(~seen, -torch.inf))
    attended = [
        torch.einsum("hqk,khd->qhd", s.softmax(-1), v_THD[c + output]) for s, c in zip(branches, contexts, strict=True)
    ]
    if weighting == "fid":
        weights = torch.stack([s.logsumexp(-1) for s in branches]).softmax(0).transpose(1, 2)[..., None]
    else:
        weights = torch.tensor([b.weight for b in example.branches], dtype=q_THD.dtype)[:, None, None, None]
    out[output] = (weights * torch.stack(attended)).sum(0)
    return out
