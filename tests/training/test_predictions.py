"""Rows in, rows out: metrics and predictions have one line per row, as in SFTTrainer, in every mode and with packing."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer

from tests.support.models import tiny_model
from tests.support.rows_oracle import parts_of, positions_of, rows_loss
from tests.training.test_interruption import two_ranks
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.segments import decode

BATCH = 3


class Recorder:
    """A `compute_metrics`, also with `batch_eval_metrics`, that keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, prediction, compute_result=True):
        self.calls.append(prediction)
        return {"lines": sum(len(rows_of(call.predictions)) for call in self.calls)}

    def rows(self, field):
        """The rows of a field over all calls."""
        return [row for call in self.calls for row in rows_of(getattr(call, field))]


def rows_of(values):
    """The rows of a field of EvalPrediction: an array, or a list of arrays with `eval_do_concat_batches=False`."""
    return [torch.as_tensor(row) for array in (values if isinstance(values, list) else [values]) for row in array]


def losses_of(predictions, labels):
    """The usual metric: the summed loss of each row."""
    pairs = zip(rows_of(predictions), rows_of(labels), strict=True)
    return [cross_entropy(p[:-1].double(), y[1:], ignore_index=-100, reduction="sum").item() for p, y in pairs]


@pytest.fixture
def chats(crab_rows):
    """Rows of different length in a format of SFTTrainer, which fill neither the last batch nor `max_length`."""
    return Dataset.from_list([{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in crab_rows[:7]])


@pytest.fixture
def make(tokenizer, make_config, chats):
    def make(rows, trainer_class=MISOSFTTrainer, train_dataset=chats, tokenizer=tokenizer, preprocess=None, **options):
        kind = SFTConfig if trainer_class is SFTTrainer else MISOSFTConfig
        recorder = Recorder()
        trainer = trainer_class(
            tiny_model("llama"),
            make_config(kind, **{"per_device_eval_batch_size": BATCH} | options),
            train_dataset=train_dataset,
            eval_dataset=rows,
            processing_class=tokenizer,
            compute_metrics=recorder,
            preprocess_logits_for_metrics=preprocess,
        )
        return trainer, recorder

    return make


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eval_accumulation_steps": 2},
        {"eval_do_concat_batches": False},
        {"batch_eval_metrics": True},
        {"label_smoothing_factor": 0.1},
        {"include_for_metrics": ["inputs", "loss"]},
        {"include_for_metrics": ["inputs", "loss"], "batch_eval_metrics": True},
        {"pad_to_multiple_of": 32},
        {"context_mode": "auto"},
        {"streamed": True},
    ],
    ids=str,
)
def test_evaluation_equals_that_of_sft_trainer(make, chats, options):
    """The same lines, and the same metrics, also those of TRL."""
    options = {"context_mode": "single"} | options
    own = {"context_mode": options.pop("context_mode")}
    rows = chats.to_iterable_dataset() if options.pop("streamed", False) else chats
    theirs, expected = make(rows, SFTTrainer, **options)
    ours, found = make(rows, **own, **options)
    metrics, expected_metrics = ours.evaluate(), theirs.evaluate()
    for name in ("eval_loss", "eval_lines"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-6), name
    logged, expected_logged = ours.state.log_history[-1], theirs.state.log_history[-1]
    for name in ("eval_entropy", "eval_mean_token_accuracy"):
        assert logged[name] == pytest.approx(expected_logged[name], rel=1e-5), name

    ids = [torch.tensor(row["input_ids"]) for row in theirs.eval_dataset]
    assert len(set(map(len, ids))) > 3
    assert len(found.calls) == len(expected.calls)
    for field in ("predictions", "label_ids"):
        lines, expected_lines = found.rows(field), expected.rows(field)
        assert len(lines) == len(expected_lines) == len(ids)
        for line, expected_line, row in zip(lines, expected_lines, ids, strict=True):
            torch.testing.assert_close(line[1 : len(row)], expected_line[1 : len(row)], rtol=0, atol=1e-4)
            assert (line[len(row) :] == -100).all()
    if options.get("batch_eval_metrics") and options.get("include_for_metrics"):
        for call, expected_call in zip(found.calls, expected.calls, strict=True):
            for name in ("input_ids", "attention_mask"):
                assert torch.equal(call.inputs[name], expected_call.inputs[name])
            assert torch.equal(call.inputs["labels"][:, 1:], expected_call.inputs["labels"][:, 1:])
            torch.testing.assert_close(call.losses, expected_call.losses)
    elif options.get("include_for_metrics"):
        assert np.array_equal(found.calls[0].inputs, expected.calls[0].inputs)
        assert found.calls[0].losses == pytest.approx(expected.calls[0].losses, rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_logits_are_preprocessed_as_rows(make, chats, packing):
    shapes = []

    def preprocess(logits, labels):
        shapes.append((tuple(logits.shape[:2]), tuple(labels.shape)))
        assert logits.dim() == 3
        return logits.argmax(-1), logits.logsumexp(-1)

    trainer, recorder = make(chats, preprocess=preprocess, packing=packing, max_length=2048)
    trainer.evaluate()
    assert all(shape == labels_shape for shape, labels_shape in shapes)
    assert [rows for (rows, _), _ in shapes] == ([7] if packing else [3, 3, 1])
    best, normalisers = recorder.calls[0].predictions
    assert best.shape == normalisers.shape == recorder.calls[0].label_ids.shape


MIXED = {"eval_contexts": "miso", "max_length": 2048, "shuffle_dataset": False}
CHUNKS = {"para": {}, "succ": {"chunk_probs": [0.2, 0.4, 0.4]}}


def one_at_a_time(prepared_rows, mode):
    """Token ids -> labels and loss of each row, by one-row-per-context execution of this row alone."""
    expected = {}
    model = tiny_model("llama").eval()
    for row in prepared_rows:
        (parts,) = parts_of(row)
        where = positions_of(parts.contexts, parts.output, "successive" if mode == "para" else "chunks")
        with torch.no_grad():
            loss = rows_loss(model, parts.contexts, parts.output, parts.labels, parts.weights, positions=where)
        labels, start = list(row["labels"]), 0
        for segment in next(decode(row["miso_layout"])).segments:
            labels[start] = -100
            start += segment.length
        expected[tuple(row["input_ids"])] = labels, loss.item()
    return expected


@pytest.mark.parametrize("mode", ["para", "succ"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_prefixes": False},
        {"pad_to_multiple_of": 64},
        {"packing": True},
        {"packing": True, "per_device_eval_batch_size": 1, "eval_accumulation_steps": 1},
    ],
    ids=str,
)
def test_lines_of_mixed_examples_equal_one_example_at_a_time(make, para_dataset, tokenizer, mode, options):
    """Each line has the tokens of its row in their order, and the loss of the row alone."""
    rows = para_dataset.select(range(7))
    options = MIXED | CHUNKS[mode] | {"context_mode": mode, "include_for_metrics": ["inputs"]} | options
    trainer, recorder = make(rows, train_dataset=rows, **options)
    prepared, _ = make(rows, train_dataset=rows, **options | {"packing": False})
    expected = one_at_a_time(prepared.eval_dataset, mode)
    packing = options.get("packing", False)
    assert len(expected) == 7 and (len(trainer.eval_dataset) < 7) == packing
    trainer.evaluate()
    (call,) = recorder.calls
    losses = losses_of(call.predictions, call.label_ids)
    if options.get("share_prefixes") is False:  # the lines have every context's copy of its tokens
        assert losses == pytest.approx([loss for _, loss in expected.values()], abs=1e-3)
        return
    seen = []
    for line, line_labels, loss in zip(call.inputs, call.label_ids, losses, strict=True):
        tokens = tuple(line[~np.isin(line, [tokenizer.pad_token_id, -100])].tolist())
        labels, expected_loss = expected[tokens]
        assert line[: len(tokens)].tolist() == list(tokens) and line_labels[: len(tokens)].tolist() == labels
        assert (line_labels[len(tokens) :] == -100).all()
        assert loss == pytest.approx(expected_loss, abs=1e-3)
        seen.append(tokens)
    assert set(seen) == expected.keys() and len(seen) == 7
    assert packing or seen == list(expected)


def test_tokenized_rows_of_several_runs_keep_their_line_in_bins(make):
    """A row with `seq_lengths` is one line, in a bin as alone."""
    rows = [{"input_ids": [5, 6, 7, 8, 9], "seq_lengths": [2, 3]}, {"input_ids": [10, 11, 12, 13], "seq_lengths": [4]}]
    dataset = Dataset.from_list(rows)
    found = []
    for packing in (False, True):
        options = {"packing": packing, "max_length": 16, "include_for_metrics": ["inputs"]}
        trainer, recorder = make(dataset, train_dataset=dataset, **options)
        assert len(trainer.eval_dataset) == (1 if packing else 2)
        trainer.evaluate()
        (call,) = recorder.calls
        lines = zip(call.inputs.tolist(), losses_of(call.predictions, call.label_ids), strict=True)
        found.append(dict(sorted((tuple(ids[:4]), loss) for ids, loss in lines)))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert list(found[0]) == [(5, 6, 7, 8), (10, 11, 12, 13)]


def as_formats(chats, para_dataset):
    text = [{"text": row["completion"][0]["content"]} for row in chats]
    return {
        "prompt": chats,
        "messages": Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in chats]),
        "text": Dataset.from_list(text),
        "constraints": para_dataset.select(range(7)),
    }


@pytest.mark.parametrize("kind", ["prompt", "messages", "text", "constraints"])
@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 512}], ids=str)
def test_predict_takes_raw_rows_and_keeps_their_order(make, chats, para_dataset, kind, options):
    """Also where evaluation rows are packed and shuffled, and batches are grouped by length."""
    options = options | {"shuffle_dataset": True, "train_sampling_strategy": "group_by_length"}
    rows = as_formats(chats, para_dataset)[kind]
    trainer, _ = make(None, train_dataset=rows, **options)
    output = trainer.predict(rows)
    alone = [trainer.predict(rows.select([i])) for i in range(7)]
    expected = [losses_of(one.predictions, one.label_ids)[0] for one in alone]
    assert len(set(expected)) == 7
    assert losses_of(output.predictions, output.label_ids) == pytest.approx(expected, abs=1e-3)
    assert output.metrics["test_lines"] >= 7
    assert "test" not in trainer.dropped_rows or not trainer.dropped_rows["test"]


def test_predict_takes_prepared_rows_and_streams(make, chats):
    trainer, _ = make(chats)
    expected = trainer.predict(chats)
    for rows in (trainer.eval_dataset, chats.to_iterable_dataset()):
        output = trainer.predict(rows)
        assert np.array_equal(output.label_ids, expected.label_ids)
        assert np.array_equal(output.predictions, expected.predictions)
    assert len(expected.label_ids) == 7


def test_prepared_bins_are_evaluated_again(make, chats):
    """The trainer's own evaluation set, and several sets of raw rows, which TRL prepares and hands to `evaluate` again."""
    trainer, recorder = make(chats, packing=True, max_length=512)
    loss = trainer.evaluate()["eval_loss"]
    assert len(trainer.eval_dataset) < len(chats)
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == pytest.approx(loss)
    assert trainer.evaluate({"own": chats})["eval_own_loss"] == pytest.approx(loss)
    lines = [sorted(losses_of(call.predictions, call.label_ids)) for call in recorder.calls]
    assert len(lines) == 3 and len(lines[0]) == len(chats)
    assert lines[1] == pytest.approx(lines[0]) and lines[2] == pytest.approx(lines[0])


def test_predict_counts_dropped_rows(make, chats, caplog):
    """The log and `dropped_rows["test"]` say which rows have no line; other predictions leave no trace."""
    empty = chats[0] | {"completion": [{"role": "assistant", "content": ""}]}
    rows = Dataset.from_list([empty, *chats, empty])
    trainer, _ = make(None)
    output = trainer.predict(rows)
    assert len(output.predictions) == 7
    ((reason, numbers),) = trainer.dropped_rows["test"].items()
    assert numbers == [0, 8]
    assert f"Dropped 2 of 9 rows of the test dataset (first: row 0): {reason}." in caplog.text
    assert "Dropped rows have no line in the predictions" in caplog.text
    caplog.clear()
    assert len(trainer.predict(chats).predictions) == 7
    assert not trainer.dropped_rows["test"] and "no line" not in caplog.text


def test_two_ranks_have_the_lines_of_their_rows(tmp_path):
    """7 rows in batches of 2 on 2 ranks, the last filled up: lines and loss as in SFTTrainer. In bins: the same rows."""
    for theirs, ours, unpacked, packed in two_ranks("predictions", tmp_path):
        assert len(theirs["losses"]) == 7
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-3)
        assert unpacked["losses"] == pytest.approx(theirs["losses"], abs=1e-3)
        assert packed["bins"] % 2 == 1 and packed["bins"] < 7
        assert sorted(packed["losses"]) == pytest.approx(sorted(theirs["losses"]), abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include_for_metrics": ["loss"]}, "whose losses are those of bins.*Fix: set eval_packing=False"),
        ({"eval_use_gather_object": True}, "eval_use_gather_object=True with packed evaluation rows.*Fix: "),
    ],
)
def test_what_has_no_line_per_row_in_bins_is_refused(make, chats, options, message):
    packed = {"packing": True, "max_length": 512}
    with pytest.raises(ValueError, match=message):
        make(chats, **packed | options)
    make(chats, eval_packing=False, **packed | options)


def test_a_batch_that_cannot_be_turned_back_is_refused(make, chats):
    trainer, _ = make(chats)
    with pytest.raises(ValueError, match="cannot be turned back into rows. Fix: "):
        trainer.evaluation_loop(trainer.get_train_dataloader(), "Training rows")
    metrics = trainer.evaluation_loop(
        trainer.get_train_dataloader(), "Training rows", prediction_loss_only=True
    ).metrics
    assert metrics["eval_loss"] > 0


# Padding of tokenized rows

PAD, EOS = 0, 1
IDS, LABELS = [5, 6, 7, 8], [-100, 6, 7, 8]
PADDED = {
    "mask, right": {"input_ids": [*IDS, PAD, PAD], "attention_mask": [1] * 4 + [0] * 2},
    "mask, left": {"input_ids": [9, 9, *IDS], "attention_mask": [0] * 2 + [1] * 4},
    "mask, with eos as padding": {"input_ids": [*IDS, EOS, EOS], "attention_mask": [1] * 4 + [0] * 2},
    "labels": {"input_ids": [*IDS, PAD], "labels": [*LABELS, PAD], "attention_mask": [1] * 4 + [0]},
    "completion mask": {"input_ids": [PAD, *IDS, PAD], "completion_mask": [0, 0, 1, 1, 1, 1]},
    "pad tokens, right": {"input_ids": [*IDS, PAD, PAD]},
    "pad tokens, left": {"input_ids": [PAD, PAD, *IDS]},
    "runs": {"input_ids": [*IDS, PAD, PAD], "seq_lengths": [2, 4]},
    "runs without the padding": {"input_ids": [*IDS, PAD, PAD], "seq_lengths": [2, 2]},
    "a run of padding": {"input_ids": [*IDS, PAD, PAD], "seq_lengths": [2, 2, 2]},
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", PADDED)
def test_padding_is_not_trained(make, name, streamed):
    rows = Dataset.from_list([PADDED[name]])
    dataset = rows.to_iterable_dataset() if streamed else rows
    trainer, _ = make(None, train_dataset=dataset, completion_only_loss=True)
    (row,) = trainer.train_dataset
    labels = LABELS if {"labels", "completion_mask"} & PADDED[name].keys() else IDS
    assert (row["input_ids"], row["labels"]) == (IDS, labels)
    runs = [example.num_tokens for example in decode(row["miso_layout"])]
    assert runs == ([2, 2] if "seq_lengths" in PADDED[name] else [4])


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [*IDS, EOS, EOS]},
        {"input_ids": [*IDS, PAD], "attention_mask": [1] * 5},
        {"input_ids": [5, PAD, 6]},
    ],
    ids=str,
)
def test_tokens_that_may_be_text_are_kept(make, row):
    """End tokens, pad tokens that the mask keeps, and pad tokens between others."""
    trainer, _ = make(None, train_dataset=Dataset.from_list([row]))
    assert trainer.train_dataset[0]["input_ids"] == row["input_ids"]


def test_a_pad_token_that_ends_texts_is_kept(make, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    trainer, _ = make(None, train_dataset=Dataset.from_list([{"input_ids": [*IDS, EOS]}]), tokenizer=tokenizer)
    assert trainer.train_dataset[0]["input_ids"] == [*IDS, EOS]


def test_rows_of_padding_only_are_dropped(make):
    rows = [{"input_ids": ids, "attention_mask": mask} for ids, mask in (([5, 6], [0, 0]), (IDS, None), ([PAD], None))]
    trainer, _ = make(None, train_dataset=Dataset.from_list(rows))
    assert trainer.train_dataset["input_ids"][:] == [IDS]
    assert trainer.dropped_rows["train"] == {"only padding": [0, 2]}


def test_a_mask_of_another_length_is_an_error(make):
    with pytest.raises(ValueError, match="Row 0: Got 3 values in column 'attention_mask' beside 4"):
        make(None, train_dataset=Dataset.from_list([{"input_ids": IDS, "attention_mask": [1, 1, 1]}]))
