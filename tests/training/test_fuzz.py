"""Any rows and settings give the loss of one-row-per-context execution, or an error that says why, and nothing else.

Each case draws settings and rows of one format, often with bad values, and takes the trainer's path: its preparation of a stream,
its collator and its loss, on a trainer that is made once. For rows without bad values the prepared rows are checked too.
"""

import importlib.metadata
import logging
import re
import signal
from collections import Counter
from contextlib import contextmanager
from copy import copy
from functools import cache

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetInfo, IterableDataset, disable_progress_bars, enable_progress_bars
from datasets.iterable_dataset import ExamplesIterable
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers.trainer_callback import PrinterCallback

from tests.data.test_property import tokenizer_of
from tests.support.fuzz_cases import cases, check_meaning, fits
from tests.support.models import tiny_model
from tests.support.rows_oracle import examples_of, parts_of, positions_of, rows_loss
from tests.training.test_bad_input import as_dataset
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.attention.support import prepare_model
from trl_miso.attention.transformers_attention import set_implementation
from trl_miso.data.pipeline import check_first_row
from trl_miso.segments.packed import WEIGHTINGS
from trl_miso.training import guards

# Relative to a loss; for a gradient, relative to the largest of its parameter.
TOLERANCE = 512 * torch.finfo(torch.float32).eps
CLEAR = re.compile("Got .*xpected .*Fix: ", re.DOTALL)


@contextmanager
def within(seconds):
    """Raise TimeoutError if the block takes longer."""

    def stop(*_):
        raise TimeoutError(f"nothing for {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tiny(window):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 640, "sliding_window": 24 if window else None}
    model = tiny_model("mistral", **sizes)
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1  # makes attention far from uniform
    return model


def defaults(folder):
    options = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    return options | {"gradient_checkpointing": False, "shuffle_dataset": False}


def reference(model, rows, case, mode):
    """The loss over all rows by one-row-per-context execution, with the weights and positions of the settings."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        for contexts, output, labels, weights in parts_of(row):
            layout = "chunks" if mode == "succ" else case.options["output_positions"]
            positions = positions_of(contexts, output, layout if len(contexts) > 1 else "successive")
            assert min(weights) > 0 and sum(weights) == pytest.approx(1)
            total += rows_loss(model, contexts, output, labels, weights, case.options["context_weighting"], positions)
            count += sum(label != -100 for label in labels[1:])
    return total / count


class Lab:
    """A trainer that is made once and takes other rows, settings and tokenizers as its constructor would, in the same order."""

    def __init__(self, window, folder):
        self.defaults = defaults(folder)
        args, dataset = MISOSFTConfig(**self.defaults), Dataset.from_list([{"input_ids": [5, 6, 7]}])
        tokenizer = tokenizer_of("bytes")
        self.trainer = MISOSFTTrainer(tiny(window), args, train_dataset=dataset, processing_class=tokenizer)

    def prepare(self, case):
        """Prepared rows of the case's stream, prepared as evaluation rows if the case is evaluated."""
        state = dict(AcceleratorState._shared_state)  # a new configuration empties it
        try:
            args = MISOSFTConfig(**self.defaults | case.options)
        finally:
            AcceleratorState._shared_state |= state
        trainer, tokenizer = self.trainer, tokenizer_of(case.tokenizer)
        stream = IterableDataset(ExamplesIterable(lambda: enumerate(case.rows), {}))  # like from_generator, but quicker
        trainer.model.set_attn_implementation("sdpa")  # as a user gives the model
        guards.check_request(args, trainer.model, None, tokenizer, None)
        check_first_row(stream, args.assistant_only_loss)
        trainer.args, trainer._tokenizer, trainer.training_mode, trainer.dropped_rows = args, tokenizer, None, {}
        trainer.completion_only_loss, trainer._bins_share_prefixes = args.completion_only_loss, args.share_prefixes
        rows = trainer._prepare_dataset(stream, tokenizer, args, args.packing, None, "train")
        if case.evaluated:
            rows = trainer._prepare_dataset(stream, tokenizer, args, args.packing, None, "eval")
        trainer._install(args)
        return list(rows)

    def loss(self, rows, batches):
        """The loss over all rows, accumulated over batches."""
        compute, collate = self.trainer.compute_loss, self.trainer.data_collator
        total = (collate(rows)["labels"] != -100).sum()
        groups = [rows[i::batches] for i in range(min(batches, len(rows)))]
        return sum(compute(self.trainer.model, collate(group), num_items_in_batch=total) for group in groups)

    def gradients(self, loss):
        model = self.trainer.model
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}


def refusal(case, error):
    """Outcome of a case whose trainer raises. AssertionError if it should not raise, or if the error does not say why."""
    assert CLEAR.search(str(error)), str(error)
    none_left = "none of whose rows can be trained on" in str(error) or "rows none of which can be" in str(error)
    assert not (case.clean and case.usual and not case.window) or (none_left and not fits(case)), str(error)
    return "all dropped" if none_left else "refused"


def mode_of(case, trainer):
    return "single" if case.evaluated and case.options["eval_contexts"] == "standard" else trainer.training_mode


def outcomes(lab, case):
    """Outcomes of a case. AssertionError for outcomes that are not allowed."""
    try:
        rows = lab.prepare(case)
    except ValueError as error:
        return [refusal(case, error)]
    trainer = lab.trainer
    if case.clean and case.usual:
        check_meaning(case, rows, trainer)
    loss = lab.loss(rows, case.batches)
    gradients = lab.gradients(loss) if case.gradients else {}
    expected = reference(trainer.model, rows, case, mode_of(case, trainer))
    assert loss.item() == pytest.approx(expected.item(), rel=TOLERANCE, abs=TOLERANCE)
    for name, gradient in lab.gradients(expected).items() if gradients else ():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=TOLERANCE * max(1, gradient.abs().max()))
    mixed = any(len(parts.contexts) > 1 for row in rows for parts in parts_of(row))
    features = {
        case.options["context_weighting"]: mixed,
        "gradients": mixed and gradients,
        "window": mixed and case.window,
        "dropped": any(trainer.dropped_rows.values()),
        "evaluated": case.evaluated,
        "mixed": mixed,
        "several answers": any(len(example) > 1 for row in rows for example in examples_of(row)),
    }
    return [f"trained {trainer.training_mode}", *(name for name, present in features.items() if present)]


@pytest.fixture
def quick(monkeypatch):
    """Silence the log of thousands of dropped rows, and cache what is the same in every case."""
    supports = {}

    def prepare(model, name, max_length):
        set_implementation(model, name)
        if (model, max_length) not in supports:
            supports[model, max_length] = prepare_model(model, name, max_length)
        return supports[model, max_length]

    monkeypatch.setattr("trl_miso.training.trainer.prepare_model", prepare)
    monkeypatch.setattr(DatasetInfo, "copy", copy)  # the original makes many deep copies per stream
    monkeypatch.setattr(importlib.metadata, "metadata", cache(importlib.metadata.metadata))
    monkeypatch.setattr(PrinterCallback, "on_log", lambda *args, **kwargs: None)
    disable_progress_bars()
    logging.disable(logging.WARNING)
    yield
    enable_progress_bars()
    logging.disable(logging.NOTSET)


def many(cases_drawn):
    return settings(
        max_examples=cases_drawn,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def test_any_rows_and_settings(tmp_path, quick):
    labs = {window: Lab(window, tmp_path) for window in (False, True)}
    counts = Counter()

    @many(2000)
    @given(cases())
    def check(case):
        with within(20):
            counts.update(outcomes(labs[case.window], case))

    check()
    trained = [f"trained {mode}" for mode in ("para", "succ", "single", "augment")]
    for name in [
        *trained,
        *WEIGHTINGS,
        "mixed",
        "several answers",
        "refused",
        "all dropped",
        "dropped",
        "evaluated",
        "window",
        "gradients",
    ]:
        assert counts[name], counts  # the numbers depend on hypothesis' version
    assert sum(counts[name] for name in trained) > 800 and counts["mixed"] > 300, counts


def test_any_rows_in_a_step_of_the_trainer(tmp_path, quick):
    """The logged loss of one step over all rows equals that of one-row-per-context execution."""
    counts = Counter()

    @many(30)
    @given(cases(), st.booleans())
    def check(case, streamed):
        # transformers' Trainer never ends a step on a stream with fewer batches than accumulation steps.
        size, batches = (24, 1) if streamed else (3, 8)
        step = {"per_device_train_batch_size": size, "gradient_accumulation_steps": batches}
        step |= {
            "per_device_eval_batch_size": 24,
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 0.0,
            "save_strategy": "no",
        }
        dataset = as_dataset(case.rows, streamed)
        if dataset is None:  # Arrow itself refuses the rows
            return
        options = {"train_dataset": dataset, "processing_class": tokenizer_of(case.tokenizer)}
        options |= {"eval_dataset": dataset} if case.evaluated else {}
        try:
            trainer = MISOSFTTrainer(
                tiny(case.window), MISOSFTConfig(**defaults(tmp_path) | step | case.options), **options
            )
            rows, evaluated = list(trainer.train_dataset), list(trainer.eval_dataset or ())
        except ValueError as error:
            counts[refusal(case, error)] += 1
            return
        with within(60):
            trainer.train()
        losses = [(trainer.state.log_history[0]["loss"], rows, trainer.training_mode)]
        if evaluated:
            losses.append((trainer.evaluate()["eval_loss"], evaluated, mode_of(case, trainer)))
        for loss, prepared, mode in losses:
            assert loss == pytest.approx(reference(trainer.model, prepared, case, mode).item(), abs=2e-4)
        counts["trained"] += 1

    check()
    assert counts["trained"] > 3, counts
