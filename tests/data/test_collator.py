"""The collator: literal batches, labels at segment borders, padding, and the views that a batch's branches have."""

import doctest
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_miso.data import collator as collator_module
from trl_miso.data.collator import MISODataCollator
from trl_miso.segments import bits_float, encode, float_bits, parallel, single, successive
from trl_miso.segments.packed import PackedSegments

bounded = settings(max_examples=100, deadline=None, database=None, derandomize=True)


def mixed_row(contexts, output, labels=None, weights=None, positions="successive"):
    weights = weights or [1 / len(contexts)] * len(contexts)
    tokens, example = parallel(contexts, len(output), weights, positions)
    labels = [-100] * len(tokens) + (labels or [-100, *output[1:]])
    return {"input_ids": tokens + output, "labels": labels, "miso_layout": encode(example)}


def chunked_row(chunks, output):
    example = successive([len(chunk) for chunk in chunks], len(output))
    tokens = sum(chunks, [])
    labels = [-100] * (len(tokens) + 1) + output[1:]
    return {"input_ids": tokens + output, "labels": labels, "miso_layout": encode(example)}


def single_row(tokens):
    return {"input_ids": tokens, "labels": tokens[:], "miso_layout": encode(single(len(tokens)))}


def joined(rows):
    """A packed row of the examples of several rows."""
    return {name: sum((row[name] for row in rows), []) for name in rows[0]}


def plain(batch):
    return {key: value.tolist() if torch.is_tensor(value) else value for key, value in batch.items()}


def assert_equal(batch, other):
    assert plain(batch) == plain(other)
    assert {k: v.dtype for k, v in batch.items() if torch.is_tensor(v)} == {
        k: v.dtype for k, v in other.items() if torch.is_tensor(v)
    }


def views(batch):
    """What every branch and every single run consists of, as a multiset: nothing here says how the batch is laid out.

    A branch is (context tokens, their distances to the first output token, output tokens, positions among themselves,
    labels, weight); a run is (tokens, positions, labels).
    """
    ids, labels, positions = (batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
    packed = PackedSegments.from_batch(batch)
    found = Counter()
    if packed.num_mixed:
        call = packed.cross_call
        cu_q, cu_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
        rows = (packed.branch_q_index + packed.output_start).tolist()
        keys = list(range(packed.output_start)) if call.kv_index is None else call.kv_index.tolist()
        for i in range(len(cu_q) - 1):
            own, path = rows[cu_q[i] : cu_q[i + 1]], keys[cu_k[i] : cu_k[i + 1]]
            turned = 0 if call.kv_offset is None else call.kv_offset[cu_k[i]].item()
            found[
                tuple(ids[key] for key in path),
                tuple(positions[own[0]] - turned - positions[key] for key in path),
                tuple(ids[row] for row in own),
                tuple(positions[row] - positions[own[0]] for row in own),
                tuple(labels[row] for row in own),
                bits_float(packed.branch_weight[cu_q[i]].item()),
            ] += 1
    cu = packed.cu_seqlens_q.tolist()
    for start, end in zip(cu, cu[1:], strict=False):
        if start >= packed.output_end:
            found[tuple(ids[start:end]), tuple(positions[start:end]), tuple(labels[start:end])] += 1
    return found


CONTEXTS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=2, max_size=5)
TOKENS = st.lists(st.integers(10, 99), min_size=1, max_size=5)


@st.composite
def rows(draw):
    """A row of one or two examples."""
    kinds = draw(st.lists(st.sampled_from(["para", "succ", "single"]), min_size=1, max_size=2))
    made = []
    for kind in kinds:
        output = draw(TOKENS)
        if kind == "single":
            made.append(single_row(output))
        elif kind == "succ":
            made.append(chunked_row(draw(CONTEXTS), output))
        else:
            positions = draw(st.sampled_from(["successive", "after_longest"]))
            made.append(mixed_row(draw(CONTEXTS), output, labels=output, positions=positions))
    return joined(made)


BATCHES = st.lists(rows(), min_size=1, max_size=4)


def test_rows_without_layout_are_causal_runs():
    batch = MISODataCollator(pad_token_id=0)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5]}])
    assert plain(batch) == {
        "input_ids": [[1, 2, 3, 4, 5]],
        "labels": [[-100, 2, 3, -100, 5]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "miso_cu_seqlens_q": [0, 3, 5],
        "miso_cu_seqlens_k": [0, 3, 5],
        "miso_max_seqlen_q": 3,
        "miso_max_seqlen_k": 3,
        "miso_num_examples": 2,
        "miso_num_mixed": 0,
        "miso_num_outputs": 0,
        "miso_weighting": 0,
        "miso_longest": 3,
        "miso_gap": 0,
        "miso_output_start": 0,
        "miso_output_end": 0,
        "miso_branch_max_seqlen_q": 0,
        "miso_branch_max_seqlen_k": 0,
        "miso_pair_max_seqlen_k": 0,
    }
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["position_ids"].dtype == torch.int64


@pytest.mark.parametrize("missing", [None, []])
def test_an_absent_layout_is_that_of_one_run(missing):
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, single_row([4, 5])]
    expected = MISODataCollator(pad_token_id=0)([single_row([1, 2, 3]), single_row([4, 5])])
    assert_equal(MISODataCollator(pad_token_id=0)(rows), expected)
    assert_equal(MISODataCollator(pad_token_id=0)([rows[0] | {"miso_layout": missing}, rows[1]]), expected)


def test_one_token():
    batch = plain(MISODataCollator(pad_token_id=0)([{"input_ids": [5], "labels": [5]}]))
    assert [batch[name] for name in ("input_ids", "labels", "position_ids")] == [[[5]], [[-100]], [[0]]]


def test_worked_example_between_single_runs():
    row = mixed_row([[1, 2, 3, 4], [1, 2, 3], [1, 2, 5]], [8, 9], weights=[0.5, 0.25, 0.25])
    batch = MISODataCollator(pad_token_id=0, weighting="fid")([single_row([6, 7]), row, single_row([11])])
    assert plain(batch) == {
        "input_ids": [[1, 2, 3, 4, 5, 8, 9, 6, 7, 11]],
        "labels": [[-100, -100, -100, -100, -100, -100, 9, -100, 7, -100]],
        "position_ids": [[0, 1, 2, 3, 2, 4, 5, 0, 1, 0]],
        "miso_cu_seqlens_q": [0, 2, 3, 4, 5, 7, 9, 10],
        "miso_cu_seqlens_k": [0, 2, 5, 9, 12, 14, 16, 17],
        "miso_max_seqlen_q": 2,
        "miso_max_seqlen_k": 4,
        "miso_num_examples": 3,
        "miso_num_mixed": 1,
        "miso_num_outputs": 1,
        "miso_weighting": 1,
        "miso_longest": 6,
        "miso_gap": 0,
        "miso_kv_index": [0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9],
        "miso_output_start": 5,
        "miso_output_end": 7,
        "miso_branch_cu_seqlens_q": [0, 2, 4, 6],
        "miso_branch_cu_seqlens_k": [0, 4, 7, 10],
        "miso_branch_max_seqlen_q": 2,
        "miso_branch_max_seqlen_k": 4,
        "miso_branch_q_index": [0, 1, 0, 1, 0, 1],
        "miso_branch_weight": [float_bits(weight) for weight in (0.5, 0.5, 0.25, 0.25, 0.25, 0.25)],
        "miso_branch_kv_index": [0, 1, 2, 3, 0, 1, 2, 0, 1, 4],
        "miso_branch_kv_offset": [0, 0, 0, 0, 1, 1, 1, 1, 1, 1],
        "miso_pair_max_seqlen_k": 0,
    }


def test_worked_example_without_sharing():
    row = mixed_row([[1, 2, 3, 4], [1, 2, 3], [1, 2, 5]], [8, 9], weights=[0.5, 0.25, 0.25])
    batch = MISODataCollator(pad_token_id=0, share_prefixes=False)([row])
    assert plain(batch) == {
        "input_ids": [[1, 2, 3, 4, 1, 2, 3, 1, 2, 5, 8, 9]],
        "labels": [[-100] * 11 + [9]],
        "position_ids": [[0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5]],
        "miso_cu_seqlens_q": [0, 4, 7, 10, 12],
        "miso_cu_seqlens_k": [0, 4, 7, 10, 12],
        "miso_max_seqlen_q": 4,
        "miso_max_seqlen_k": 4,
        "miso_num_examples": 1,
        "miso_num_mixed": 1,
        "miso_num_outputs": 1,
        "miso_weighting": 0,
        "miso_longest": 6,
        "miso_gap": 0,
        "miso_output_start": 10,
        "miso_output_end": 12,
        "miso_branch_cu_seqlens_q": [0, 2, 4, 6],
        "miso_branch_cu_seqlens_k": [0, 4, 7, 10],
        "miso_branch_max_seqlen_q": 2,
        "miso_branch_max_seqlen_k": 4,
        "miso_branch_q_index": [0, 1, 0, 1, 0, 1],
        "miso_branch_weight": [float_bits(weight) for weight in (0.5, 0.5, 0.25, 0.25, 0.25, 0.25)],
        "miso_pair_max_seqlen_k": 0,
    }


def test_two_mixed_examples_share_one_output_slice():
    first = mixed_row([[1, 2], [1]], [8, 9])
    second = chunked_row([[3], [4, 5]], [6, 7])
    batch = plain(MISODataCollator(pad_token_id=0)([first, single_row([10]), second]))
    assert batch["input_ids"] == [[1, 2, 3, 4, 5, 8, 9, 6, 7, 10]]
    assert batch["labels"] == [[-100] * 6 + [9, -100, 7, -100]]
    assert batch["position_ids"] == [[0, 1, 0, 1, 2, 2, 3, 3, 4, 0]]
    assert (batch["miso_output_start"], batch["miso_output_end"]) == (5, 9)
    assert batch["miso_branch_q_index"] == [0, 1, 0, 1, 2, 3, 2, 3]
    assert batch["miso_branch_kv_offset"] == [0, 0, 1, 0, 0, 0]
    assert batch["miso_branch_kv_index"] == [0, 1, 0, 2, 3, 4]
    assert batch["miso_branch_cu_seqlens_k"] == [0, 2, 3, 4, 6]
    assert batch["miso_gap"] == 1, "the first chunk does not end where the output begins"


def test_docstring_example():
    failed, attempted = doctest.testmod(collator_module)
    assert attempted and not failed


@bounded
@given(BATCHES, st.booleans())
def test_first_token_of_a_segment_is_never_labelled_and_no_other_label_is_lost(batch_rows, share):
    batch = MISODataCollator(pad_token_id=0, share_prefixes=share)(batch_rows)
    labels, ids = batch["labels"][0], batch["input_ids"][0]
    starts = set(batch["miso_cu_seqlens_q"][:-1].tolist())
    assert all(labels[row] == -100 for row in starts)
    assert all(labels[row] == -100 for row in range(batch["miso_output_start"])), "contexts are never labelled"
    # Outputs and runs in these rows are labelled throughout: chunked rows on all but their first token.
    for row in range(batch["miso_output_start"], len(ids)):
        assert row in starts or labels[row] == ids[row]


@bounded
@given(BATCHES)
def test_sharing_changes_no_view(batch_rows):
    shared = MISODataCollator(pad_token_id=0)(batch_rows)
    separate = MISODataCollator(pad_token_id=0, share_prefixes=False)(batch_rows)
    assert views(shared) == views(separate)
    assert "miso_kv_index" not in separate and "miso_branch_kv_offset" not in separate
    assert shared["input_ids"].shape[1] <= separate["input_ids"].shape[1]
    same = "longest", "gap", "num_examples", "num_mixed", "weighting"
    assert all(shared[f"miso_{name}"] == separate[f"miso_{name}"] for name in same)


@bounded
@given(CONTEXTS, TOKENS, st.booleans())
def test_a_mixed_row_is_seen_as_its_contexts_followed_by_the_output(contexts, output, share):
    batch = MISODataCollator(pad_token_id=0, share_prefixes=share)([mixed_row(contexts, output)])
    weight = 1 / len(contexts)
    assert views(batch) == Counter(
        (
            tuple(context),
            tuple(range(len(context), 0, -1)),
            tuple(output),
            tuple(range(len(output))),
            (-100, *output[1:]),
            weight,
        )
        for context in contexts
    )


@bounded
@given(BATCHES, st.randoms(use_true_random=False), st.booleans())
def test_order_of_rows_changes_nothing_within_examples(batch_rows, random, share):
    collate = MISODataCollator(pad_token_id=0, share_prefixes=share)
    shuffled = random.sample(batch_rows, len(batch_rows))
    assert views(collate(shuffled)) == views(collate(batch_rows))


@bounded
@given(BATCHES, st.booleans())
def test_a_packed_row_is_the_batch_of_its_examples(batch_rows, share):
    collate = MISODataCollator(pad_token_id=0, share_prefixes=share)
    assert_equal(collate([joined(batch_rows)]), collate(batch_rows))


@bounded
@given(BATCHES, st.sampled_from(["uniform", "fid", "vanilla"]), st.sampled_from([0, 3]))
def test_a_cast_of_floats_touches_nothing(batch_rows, weighting, window):
    """DeepSpeed casts a batch's floats to the training precision: there is none to cast."""
    batch = MISODataCollator(pad_token_id=0, weighting=weighting, window=window)(batch_rows)
    for value in batch.values():
        assert value.dtype in (torch.int32, torch.int64) if torch.is_tensor(value) else type(value) is int
    assert PackedSegments.from_batch(batch).to_batch().keys() == {key for key in batch if key.startswith("miso_")}


@bounded
@given(BATCHES)
def test_rows_are_left_as_they_were(batch_rows):
    before = [{name: list(column) for name, column in row.items()} for row in batch_rows]
    MISODataCollator(pad_token_id=0, share_prefixes=False, pad_to_multiple_of=8)(batch_rows)
    assert batch_rows == before


def test_padding_is_an_unlabelled_run_of_its_own():
    row = mixed_row([[1, 2], [1, 3]], [8, 9])
    batch = plain(MISODataCollator(pad_token_id=77, pad_to_multiple_of=8)([row]))
    assert batch["input_ids"] == [[1, 2, 3, 8, 9, 77, 77, 77]]
    assert batch["labels"] == [[-100, -100, -100, -100, 9, -100, -100, -100]]
    assert batch["position_ids"] == [[0, 1, 1, 2, 3, 0, 1, 2]]
    assert batch["miso_cu_seqlens_q"] == [0, 1, 2, 3, 5, 8]
    assert batch["miso_cu_seqlens_k"] == [0, 1, 3, 5, 7, 10]
    assert batch["miso_kv_index"] == [0, 0, 1, 0, 2, 3, 4, 5, 6, 7]
    assert (batch["miso_output_start"], batch["miso_output_end"]) == (3, 5)
    assert batch["miso_branch_kv_index"] == [0, 1, 0, 2]


@bounded
@given(BATCHES, st.booleans(), st.integers(1, 9))
def test_padding_fills_up_and_changes_no_view(batch_rows, share, multiple):
    batch = MISODataCollator(pad_token_id=0, share_prefixes=share)(batch_rows)
    padded = MISODataCollator(pad_token_id=0, share_prefixes=share, pad_to_multiple_of=multiple)(batch_rows)
    short = -batch["input_ids"].shape[1] % multiple
    assert padded["input_ids"].shape[1] == batch["input_ids"].shape[1] + short
    assert padded["input_ids"].shape[1] % multiple == 0
    if not short:
        assert_equal(padded, batch)
    run = Counter([((0,) * short, tuple(range(short)), (-100,) * short)]) if short else Counter()
    assert views(padded) == views(batch) + run


def test_padding_is_not_an_example():
    row = mixed_row([[1, 2], [1, 3]], [8, 9])
    assert MISODataCollator(pad_token_id=0, pad_to_multiple_of=8)([row])["miso_num_examples"] == 1


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    "window, binds", [(0, False), (1, True), (5, True), (6, False), (7, False)], ids=lambda value: str(value)
)
def test_binding_windows_get_the_pairs_form(window, binds, share):
    """The longest context with its output has 6 tokens: a window of 6 does not bind."""
    row = mixed_row([[1, 2, 3, 4], [1, 2, 3], [1, 2, 5]], [8, 9])
    batch = MISODataCollator(pad_token_id=0, window=window, share_prefixes=share)([row])
    assert batch["miso_longest"] == 6
    assert ("miso_pair_kv_index" in batch) == binds == ("miso_pair_cu_seqlens_k" in batch)
    rest = MISODataCollator(pad_token_id=0, share_prefixes=share)([row])
    for key, value in plain(rest).items():
        if "pair" not in key:
            assert plain(batch)[key] == value


def test_single_runs_need_no_pairs_form():
    batch = MISODataCollator(pad_token_id=0, window=2)([single_row([1, 2, 3, 4])])
    assert "miso_pair_kv_index" not in batch


@pytest.mark.parametrize("weighting, index", [("uniform", 0), ("fid", 1), ("vanilla", 2)])
def test_weighting_travels_as_an_index(weighting, index):
    batch = MISODataCollator(pad_token_id=0, weighting=weighting)([mixed_row([[1], [2]], [8, 9])])
    assert batch["miso_weighting"] == index


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    "change, numbers",
    [
        ({"input_ids": [1, 2, 3, 8]}, "4 tokens and 5 labels whose layout has 5 tokens"),
        ({"input_ids": [1, 2, 3, 8, 9, 9]}, "6 tokens and 5 labels whose layout has 5 tokens"),
        ({"labels": [-100, -100, -100, 8]}, "5 tokens and 4 labels whose layout has 5 tokens"),
        ({"labels": [-100] * 6}, "5 tokens and 6 labels whose layout has 5 tokens"),
        ({"miso_layout": encode(single(4))}, "5 tokens and 5 labels whose layout has 4 tokens"),
        ({"miso_layout": encode(single(5)) * 2}, "5 tokens and 5 labels whose layout has 10 tokens"),
        ({"miso_layout": None, "labels": [1]}, "5 tokens and 1 labels whose layout has 5 tokens"),
    ],
    ids=["few ids", "many ids", "few labels", "many labels", "short layout", "long layout", "no layout"],
)
def test_malformed_rows_are_refused(change, numbers, share):
    row = mixed_row([[1, 2], [1, 3]], [8, 9]) | change
    with pytest.raises(ValueError, match=f"Got a row of {numbers}, expected equal numbers above 0. Fix:"):
        MISODataCollator(pad_token_id=0, share_prefixes=share)([single_row([1]), row])


@pytest.mark.parametrize("empty_first", [True, False])
def test_empty_rows_are_refused(empty_first):
    rows = [{"input_ids": [], "labels": []}, single_row([1, 2])]
    with pytest.raises(ValueError, match="Got a row of 0 tokens.*Fix"):
        MISODataCollator(pad_token_id=0)(rows if empty_first else rows[::-1])


@pytest.mark.parametrize("kept", [1, 5, -1])
def test_cut_layouts_are_refused(kept):
    row = mixed_row([[1, 2], [1, 3]], [8, 9])
    with pytest.raises(ValueError, match="Got a layout that ends within an example.*Fix"):
        MISODataCollator(pad_token_id=0)([row | {"miso_layout": row["miso_layout"][:kept]}])
