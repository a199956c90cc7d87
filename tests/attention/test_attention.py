"""The operator: forward and all gradients of every form equal the definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.answers import answers
from tests.support.models import rotation
from trl_miso.attention import mixture
from trl_miso.attention.kernels import KERNELS, KernelOptions
from trl_miso.attention.mixture import miso_attention
from trl_miso.attention.reference import mixture_of_contexts, reference_attention
from trl_miso.segments import lay_out, parallel, single, successive, unshare
from trl_miso.segments.packed import WEIGHTINGS, pack

H, G, D, SCALE = 4, 2, 8, 0.35
TURN = rotation(D)


@st.composite
def examples(draw, contiguous=False):
    """One to four examples: ragged, with or without shared prefixes, some of them single runs.

    `contiguous`: only layouts in which contexts end where their output begins, as sliding windows need.
    """

    def tokens(low, high):
        return draw(st.lists(st.integers(0, 2), min_size=low, max_size=high))

    batch = []
    for _ in range(draw(st.integers(1, 4))):
        output = draw(st.integers(1, 5))
        kinds = ["single", "para", "para", "unshared", "answers"] + ([] if contiguous else ["succ", "after_longest"])
        kind = draw(st.sampled_from(kinds))
        if kind == "single":
            batch.append(single(draw(st.integers(1, 8))))
        elif kind == "answers":
            positions = ("successive",) if contiguous else ("successive", "after_longest", "chunks")
            batch.append(lay_out(draw(answers(positions, most=3)))[2])
        elif kind == "succ":
            batch.append(successive(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)), output))
        else:
            prefix = tokens(1, 4)
            contexts = [prefix + tokens(0, 5) for _ in range(draw(st.integers(2, 5)))]
            weights = draw(st.lists(st.floats(0.05, 1.0), min_size=len(contexts), max_size=len(contexts)))
            weights = [w / sum(weights) for w in weights]
            positions = "after_longest" if kind == "after_longest" else "successive"
            ids, example = parallel(contexts, output, weights, positions)
            batch.append(unshare(example, [ids + [0] * output])[0] if kind == "unshared" else example)
    return batch


def _inputs(batch, dtype=torch.float64, seed=0):
    """q, k, v as leaves, and a gradient of the output; tokens in the order of the examples."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(example.num_tokens for example in batch)
    leaves = [torch.randn(total, heads, D, generator=generator, dtype=torch.float64) for heads in (H, G, G)]
    grad = torch.randn(total, H, D, generator=generator, dtype=torch.float64).to(dtype)
    return [x.to(dtype).requires_grad_() for x in leaves], grad


def _dense(batch, leaves, grad, weighting, window=0):
    """Output and gradients by the definition."""
    outputs, at = [], 0
    for example in batch:
        rows = slice(at, at := at + example.num_tokens)
        outputs.append(reference_attention(*(x[rows] for x in leaves), example, weighting, SCALE, TURN, window))
    out = torch.cat(outputs)
    return [out, *torch.autograd.grad((out * grad).sum(), leaves)]


def _packed(batch, leaves, grad, weighting, kernel="cpu", window=0, form=None):
    """Output and gradients by packed attention, back in the order of the examples."""
    order, _, packed = pack(batch, weighting, window=1)
    order = torch.from_numpy(order)
    options = KernelOptions(SCALE, window=window)
    arguments = *(x[order] for x in leaves), packed, KERNELS[kernel], options, TURN
    out = (form.apply if form else miso_attention)(*arguments)
    out = torch.empty_like(out).index_copy(0, order, out)
    return [out, *torch.autograd.grad((out * grad).sum(), leaves)]


def _assert_close(got, expected, tolerance):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_the_definition_is_equation_3():
    """The oracle of these tests, for contexts of one length, which need no rotation."""
    contexts, output, weights = [[1, 2, 3], [1, 4, 5], [6, 7, 8]], 4, [0.5, 0.3, 0.2]
    tokens, shared = parallel(contexts, output, weights, "successive")
    example, (order,) = unshare(shared, [list(range(len(tokens) + output))])
    q, k, v = (x.detach() for x in _inputs([shared])[0])
    expected = reference_attention(q[order], k[order], v[order], example, "uniform", SCALE)[-output:]

    k, v = (x[order].repeat_interleave(H // G, dim=1).transpose(0, 1) for x in (k, v))
    runs = [(k[:, i : i + 3], v[:, i : i + 3]) for i in (0, 3, 6)]
    got = mixture_of_contexts(q[order][-output:].transpose(0, 1), runs, (k[:, 9:], v[:, 9:]), weights, SCALE)
    torch.testing.assert_close(got.transpose(0, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@settings(max_examples=40, deadline=None)
@given(batch=examples(), seed=st.integers(0, 1000))
def test_split_form_equals_the_definition(kernel, weighting, batch, seed):
    leaves, grad = _inputs(batch, seed=seed)
    _assert_close(_packed(batch, leaves, grad, weighting, kernel), _dense(batch, leaves, grad, weighting), 1e-12)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("weighting", ["uniform", "fid"])
@settings(max_examples=40, deadline=None)
@given(batch=examples(contiguous=True), seed=st.integers(0, 1000), window=st.integers(0, 12))
def test_pairs_form_equals_the_definition(kernel, weighting, batch, seed, window):
    leaves, grad = _inputs(batch, seed=seed)
    expected = _dense(batch, leaves, grad, weighting, window)
    if any(example.branches for example in batch):
        _assert_close(_packed(batch, leaves, grad, weighting, kernel, window, mixture.PairsForm), expected, 1e-12)
    _assert_close(_packed(batch, leaves, grad, weighting, kernel, window), expected, 1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@settings(max_examples=25, deadline=None)
@given(batch=examples(), seed=st.integers(0, 1000))
def test_shared_equals_unshared(weighting, batch, seed):
    """The outputs of the shared layout equal those of every context with its own copy."""
    leaves, grad = _inputs(batch, seed=seed)
    shared = _packed(batch, leaves, grad, weighting)[0]
    at = 0
    for example in batch:
        rows = list(range(at, at := at + example.num_tokens))
        separate, (copies,) = unshare(example, [rows])
        # Right-aligned contexts stand `-offset` positions later, everything else at the same position.
        offsets = [branch.offset for branch in example.branches]
        lengths = [segment.length for segment in separate.segments]
        in_contexts = sorted(separate.contexts())
        shift = dict(zip(in_contexts, offsets, strict=True))
        moved = torch.tensor([-shift.get(s, 0) for s, n in enumerate(lengths) for _ in range(n)])
        q, k, v = (x.detach()[copies] for x in leaves)
        q, k = (TURN(x, moved, int(moved.max()) + 1) for x in (q, k))
        order, _, packed = pack([separate], weighting)
        order = torch.from_numpy(order)
        out = miso_attention(q[order], k[order], v[order], packed, KERNELS["cpu"], KernelOptions(SCALE))
        torch.testing.assert_close(out[order.argsort()], shared[copies], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("form", "weighting"),
    [*((mixture.SplitForm, w) for w in WEIGHTINGS), (mixture.PairsForm, "uniform"), (mixture.PairsForm, "fid")],
)
def test_low_precision_within_twice_the_error_of_dense(dtype, form, weighting):
    """The root mean square error against float64 is at most twice that of the dense computation in the same dtype."""
    prefix = list(range(40))
    contexts = [prefix + [100 + i] * n for i, n in enumerate((30, 5, 12, 9, 20))]
    batch = [parallel(contexts, 50, [0.2] * 5, "successive")[1], single(33)]
    errors, budgets = torch.zeros(4), torch.zeros(4)  # squared, of out, dq, dk, dv
    for seed in range(3):
        leaves, grad = _inputs(batch, dtype, seed)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        truth = _dense(batch, exact, grad.double(), weighting)
        for total, results in (
            (errors, _packed(batch, leaves, grad, weighting, form=form)),
            (budgets, _dense(batch, leaves, grad, weighting)),
        ):
            total += torch.tensor([(x.double() - y).square().sum() for x, y in zip(results, truth, strict=True)])
    ratios = (errors / budgets).sqrt()
    assert (ratios <= 2).all(), f"error of out, dq, dk, dv over that of dense: {ratios}"


def test_equal_contexts_equal_one_context():
    """n copies of one context mix to ordinary attention, with any fixed weights and with fid; vanilla dilutes the output."""
    context, output = [1, 2, 3, 4], 3
    copies = parallel([context, context, context], output, [0.5, 0.3, 0.2], "successive")[1]
    leaves, grad = _inputs([copies])
    plain = _packed([single(copies.num_tokens)], leaves, grad, "uniform")
    for weighting in ("uniform", "fid"):
        _assert_close(_packed([copies], leaves, grad, weighting), plain, 1e-12)
    assert (_packed([copies], leaves, grad, "vanilla")[0] - plain[0]).abs().max() > 1e-2


def test_gradcheck():
    batch = [parallel([[1, 2], [1, 3, 4], [1]], 2, [0.5, 0.25, 0.25], "successive")[1], single(2)]
    order, _, packed = pack(batch, "uniform")
    leaves, _ = _inputs(batch)
    options = KernelOptions(SCALE)
    assert torch.autograd.gradcheck(lambda *x: miso_attention(*x, packed, KERNELS["cpu"], options, TURN), leaves)


def test_softcap_equals_the_definition():
    batch = [parallel([[1, 2], [1, 3, 4], [1]], 3, [0.5, 0.25, 0.25], "successive")[1]]
    order, _, packed = pack(batch, "fid")
    order = torch.from_numpy(order)
    leaves, grad = _inputs(batch)
    expected = reference_attention(*leaves, batch[0], "fid", SCALE, TURN, softcap=1.5)
    options = KernelOptions(SCALE, softcap=1.5)
    got = miso_attention(*(x[order] for x in leaves), packed, KERNELS["reference"], options, TURN)[order.argsort()]
    for a, b in (
        (got, expected),
        *zip(*(torch.autograd.grad((x * grad).sum(), leaves) for x in (got, expected)), strict=True),
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("what", ["gap", "vanilla"])
def test_window_that_cannot_be_honoured_is_refused(what):
    if what == "gap":
        batch, weighting = [successive([3, 3], 2)], "uniform"
    else:
        batch, weighting = [parallel([[1, 2, 3], [1, 4]], 2, [0.5, 0.5], "successive")[1]], "vanilla"
    leaves, grad = _inputs(batch)
    with pytest.raises(ValueError, match="(?s)sliding window of 2.*Expected.*Fix|expected.*Fix"):
        _packed(batch, leaves, grad, weighting, window=2)
    _packed(batch, leaves, grad, weighting, window=100)
