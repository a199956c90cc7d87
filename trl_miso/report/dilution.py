"""How much of an output token's attention is left to the output itself, as contexts are added (paper, section 4.3).

S_i and S_out are the sums of exponentiated scores to context i and to the output. With x_i = S_i / S_out, the output's share is
A_i = 1 / (1 + x_i) if context i is the only one. With n contexts it is:

    vanilla   1 / (1 + sum_i x_i)            eq. 5: falls towards 0 as n grows
    uniform   sum_i 1/n A_i                  eq. 3: the arithmetic mean of the A_i
    fid       n / (n + sum_i x_i)            eq. 7: the harmonic mean of the A_i
"""

import numpy as np

WEIGHTINGS = ("uniform", "fid", "vanilla")


def masses(share: np.ndarray, weights: np.ndarray, weighting: str) -> np.ndarray:
    """Recover m_i = sigmoid(l_i - l_out) = S_i / (S_i + S_out) from the contexts' shares in a mixture.

    Args:
        share: (..., n), what `attention.shares.Shares` receives: w_i m_i for fixed weights, otherwise each context's part of the
            one softmax.
        weights: (n,), read for `"uniform"` only, which stands for all fixed weights.
    """
    if weighting == "uniform":
        return share / weights
    out = 1 - share.sum(-1, keepdims=True)
    if weighting == "fid":  # its softmax counts the output once per context
        out = out / share.shape[-1]
    return share / (share + out)


def output_share(mass: np.ndarray, weighting: str) -> np.ndarray:
    """The output's share (...) under a weighting for masses m_i (..., n), by the definitions above."""
    if weighting == "uniform":
        return (1 - mass).mean(-1)
    x = (mass / (1 - mass)).sum(-1)
    n = mass.shape[-1] if weighting == "fid" else 1
    return n / (n + x)


def equation_6(mass: np.ndarray) -> np.ndarray:
    """Vanilla's output share as the paper writes it in eq. 6, from masses m_i (..., n).

    Equals `harmonic_mean_i(A_i) (1/n + S_out / sum_i S_i) / (1 + S_out / sum_i S_i)`.
    """
    single = 1 - mass.astype(np.float64)  # A_i
    n = single.shape[-1]
    with np.errstate(divide="ignore", invalid="ignore"):  # a share of the output may be 0 or 1
        harmonic_mean = n / (1 / single).sum(-1)
        ratio = 1 / (1 / single - 1).sum(-1)
        return np.where(np.isinf(ratio), 1.0, harmonic_mean * (1 / n + ratio) / (1 + ratio))
