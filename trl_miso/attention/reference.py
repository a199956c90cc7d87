"""The definition of MISO attention, densely, in any dtype, with autograd's own gradients: what all other code is tested against.

Shares nothing with `mixture.py`, `kernels.py` or the packing: no log-sum-exp merge, no varlen call, no index tensors.

Shapes: T tokens, U output tokens, S_i tokens of context i, H query heads, G key-value heads, D head dimension of queries and keys,
V of values.
"""

from collections.abc import Callable, Sequence

import torch

from trl_miso.segments.tree import Example


def mixture_of_contexts(
    q_HUD: torch.Tensor,
    contexts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    output: tuple[torch.Tensor, torch.Tensor],
    weights: Sequence[float],
    scale: float,
) -> torch.Tensor:
    """Eq. 3 of the paper: `sum_i w_i softmax(Q [K_i, K_out]^T) [V_i, V_out]`, causal in the output, (H, U, V).

    Args:
        q_HUD: Queries of the output tokens.
        contexts: Keys (H, S_i, D) and values (H, S_i, V) of each context. output: those of the output, with U in place of S_i.
        weights: Score_i of the paper, which sum to 1.
    """
    mixed = torch.zeros_like(output[1])
    for (k, v), weight in zip(contexts, weights, strict=True):
        k, v = torch.cat([k, output[0]], dim=1), torch.cat([v, output[1]], dim=1)
        scores = scale * q_HUD @ k.mT
        visible = torch.ones_like(scores, dtype=torch.bool).tril(k.shape[1] - q_HUD.shape[1])
        mixed += weight * scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
    return mixed


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
    """Attention of one example whose T tokens are in its own segment order, with all that models add to eq. 3.

    Args:
        q_THD: (T, H, D). k_TGD: (T, G, D). v_TGD: (T, G, V).
        weighting: `"uniform"` (the branches' own weights, eq. 3), `"fid"` (eq. 7) or `"vanilla"` (eq. 4).
        rotation: See `rotation.Rotation`; applied to the output's queries.
        window: Number of keys that a query sees, itself included, counted along the context and then the output; 0 for all.
        softcap: c > 0 makes the scores `c tanh(s / c)`; 0 for none.

    Returns:
        (T, H, V).
    """
    repeats = q_THD.shape[1] // k_TGD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(repeats, dim=1) for x in (k_TGD, v_TGD))
    tokens, start = [], 0  # of each segment
    for segment in example.segments:
        tokens.append(list(range(start, start + segment.length)))
        start += segment.length

    def path_tokens(index: int) -> list[int]:
        return [token for i in example.path(index) for token in tokens[i]]

    def scores(queries: list[int], keys: list[int], offset: int = 0) -> torch.Tensor:
        """(H, queries, keys), not masked yet; the queries turned by `offset` positions."""
        q = q_THD[queries]
        if offset:
            assert rotation is not None, "an example with query offsets needs a rotation"
            q = rotation(q, torch.full((len(queries),), abs(offset)), abs(offset) + 1, inverse=offset < 0)
        s = torch.einsum("qhd,khd->hqk", q, k_THD[keys]) * scale
        return softcap * torch.tanh(s / softcap) if softcap else s

    def masked(s: torch.Tensor) -> torch.Tensor:
        """Causal and windowed, the last query at the last key."""
        n_queries, n_keys = s.shape[1:]
        distance = torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)
        visible = (distance >= 0) & (distance < (window or n_keys + 1))
        return s.masked_fill(~visible, -torch.inf)

    def attend(s: torch.Tensor, keys: list[int]) -> torch.Tensor:
        return torch.einsum("hqk,khd->qhd", s.softmax(-1), v_THD[keys])

    out = torch.empty_like(v_THD)
    output_segments = {output.segment for output in example.outputs}
    for i, segment_tokens in enumerate(tokens):
        if i not in output_segments:
            path = path_tokens(i)
            out[segment_tokens] = attend(masked(scores(segment_tokens, path)), path)

    for output in example.outputs:
        queries = tokens[output.segment]
        to_output = scores(queries, queries)
        contexts = [path_tokens(branch.segment) for branch in output.branches]
        to_context = [scores(queries, c, branch.offset) for c, branch in zip(contexts, output.branches, strict=True)]

        # Vanilla: one softmax over all contexts and the output (eq. 4).
        if weighting == "vanilla":
            keys = [token for context in contexts for token in context] + queries
            out[queries] = attend(torch.cat([*to_context, masked(to_output)], -1), keys)
            continue

        # Otherwise one softmax per context, over [K_i, K_out], and the weighted sum (eq. 3).
        pairs = [masked(torch.cat([s, to_output], -1)) for s in to_context]
        attended = [attend(s, context + queries) for s, context in zip(pairs, contexts, strict=True)]
        if weighting == "fid":
            # w_i in proportion to S_i + S_out, the exponentiated scores of branch i (eq. 7).
            weights = torch.stack([s.logsumexp(-1) for s in pairs]).softmax(0).transpose(1, 2)[..., None]
        else:
            weights = torch.tensor([branch.weight for branch in output.branches], dtype=q_THD.dtype)
            weights = weights[:, None, None, None]
        out[queries] = (weights * torch.stack(attended)).sum(0)
    return out
