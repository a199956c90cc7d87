"""Read this first: what MISO computes, in a few lines of torch, and that the package computes the same.

An ordinary row is one context (the instruction) followed by the output. MISO gives one output several contexts: the full instruction,
each constraint alone, ... Every context is processed by itself. In every layer, an output token attends to each context followed by
the output, once per context, and the results are averaged (paper, eq. 3):

    out = sum_i w_i softmax(q [K_i, K_out]^T) [V_i, V_out]

The package never runs one row per context. It packs all contexts and one copy of the output into a single row, and stores common
prefixes once. The tests below compare both.
"""

import torch
import torch.nn.functional as F

from tests.support.models import tiny_model
from tests.support.rows_oracle import rows_loss
from trl_miso.attention import register_miso_attention
from trl_miso.attention.kernels import KERNELS, KernelOptions
from trl_miso.attention.mixture import miso_attention
from trl_miso.attention.support import prepare_model
from trl_miso.data.collator import MISODataCollator
from trl_miso.segments import encode, pack, parallel


def test_attention_is_the_mean_over_contexts():
    # Two contexts without a common prefix and of the same length, so that the packed row is [context 0 | context 1 | output].
    n, size, heads, dim = 4, 3, 2, 8  # tokens of a context, tokens of the output
    contexts = [[10, 11, 12, 13], [20, 21, 22, 23]]
    q, k, v = torch.randn(3, 2 * n + size, heads, dim, dtype=torch.float64)

    # Eq. 3 in six lines (as in `attention/reference.py`): an output token sees the whole context, and the output up to itself.
    expected, output = 0, slice(2 * n, None)
    for context in (slice(0, n), slice(n, 2 * n)):
        keys, values = (torch.cat([x[context], x[output]]) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[output], keys) * dim**-0.5
        scores = scores.masked_fill(torch.ones(size, n + size).tril(n) == 0, -torch.inf)
        expected += torch.einsum("hqk,khd->qhd", scores.softmax(-1), values) / 2

    # The package: the layout of the example, packed with its metadata, and one call of the operator.
    _, example = parallel(contexts, size, weights=[0.5, 0.5], output_positions="successive")
    order, _, packed = pack([example], "uniform")
    assert order.tolist() == list(range(2 * n + size))
    got = miso_attention(q, k, v, packed, KERNELS["cpu"], KernelOptions(scale=dim**-0.5))[output]
    torch.testing.assert_close(got, expected)


def test_a_model_trains_as_with_one_row_per_context():
    model = tiny_model("llama")
    contexts = [
        [5, 6, 7, 8, 9, 10],
        [5, 6, 7],
        [5, 6, 20, 21],
        [5, 6],
    ]  # full, two constraints, bare: one common prefix
    output = [2, 60, 61, 62]
    labels = [-100, *output[1:]]  # the first token is not predicted: which context's last token would predict it?
    weights = [1 / len(contexts)] * len(contexts)

    # Naively: four rows, each a context and its own copy of the output, as ordinary causal runs. In every layer the attention
    # outputs of the four copies of an output token are replaced by their mean.
    expected = rows_loss(model, contexts, output, labels, weights)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))

    # The package: one row with every distinct prefix once: 12 tokens instead of 31.
    tokens, example = parallel(contexts, len(output), weights, "successive")
    assert (len(tokens + output), sum(len(context + output) for context in contexts)) == (12, 31)
    row = {"input_ids": tokens + output, "labels": [-100] * len(tokens) + labels, "miso_layout": encode(example)}
    prepare_model(model, register_miso_attention("sdpa"), max_length=None)
    batch = MISODataCollator(pad_token_id=0)([row])
    targets = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    loss = F.cross_entropy(logits[0, :-1].double(), targets[0, 1:], ignore_index=-100, reduction="sum")
    gradients = torch.autograd.grad(loss, list(model.parameters()))

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for (name, _), got, wanted in zip(model.named_parameters(), gradients, expected_gradients, strict=True):
        scale = wanted.abs().max().clamp(min=1.0)
        torch.testing.assert_close(got / scale, wanted / scale, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
