"""How much of an output token's attention is left to the output itself, as contexts are added (paper, section 4.3).

With S_i and S_out the sums of exponentiated scores to context i and to the output, x_i = S_i / S_out, and A_i = 1 / (1 + x_i) the
output's share if context i were the only one:

    vanilla   1 / (1 + sum_i x_i)            eq. 5: falls towards 0 as n grows
    uniform   sum_i 1/n A_i                  eq. 3: the mean of what it was
    fid       n / (n + sum_i x_i)            eq. 7: their harmonic mean
"""

import numpy as np

WEIGHTINGS = ("uniform", "fid", "vanilla")


def masses(share: np.ndarray, weights: np.ndarray, weighting: str) -> np.ndarray:
    """m_i = sigmoid(l_i - l_out) = S_i / (S_i + S_out) from the contexts' shares of a mixture.

    Args:
        share: (..., n), what `attention.shares.Shares` is given: w_i m_i for fixed weights, else parts of the one softmax.
        weights: (n,), read for `"uniform"`, which stands for any fixed weights.
    """
    if weighting == "uniform":
        return share / weights
    out = 1 - share.sum(-1, keepdims=True)
    if weighting == "fid":  # in whose softmax the output counts once a context
        out = out / share.shape[-1]
    return share / (share + out)


def output_share(mass: np.ndarray, weighting: str) -> np.ndarray:
    """The output's share (...) that a weighting gives for masses m_i (..., n), from the definitions above."""
    if weighting == "uniform":
        return (1 - mass).mean(-1)
    x = (mass / (1 - mass)).sum(-1)
    n = mass.shape[-1] if weighting == "fid" else 1
    return n / (n + x)


def equation_6(mass: np.ndarray) -> np.ndarray:
    """`harmonic_mean_i(A_i) (1/n + S_out / sum_i S_i) / (1 + S_out / sum_i S_i)`, as the paper writes vanilla's share."""
    alone = 1 - mass.astype(np.float64)
    n = alone.shape[-1]
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing may be left of the output, or all
        harmonic_mean = n / (1 / alone).sum(-1)
        ratio = 1 / (1 / alone - 1).sum(-1)
        return np.where(np.isinf(ratio), 1.0, harmonic_mean * (1 / n + ratio) / (1 + ratio))
