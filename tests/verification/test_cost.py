"""The checks compare with exact log-probabilities, run on short rows, and say how far they are and what they took."""

import logging
import math
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.models import tiny_model
from tests.verification.test_verification import NAMES, make_trainer
from trl_miso.cli.main import main
from trl_miso.segments import encode, parallel, single
from trl_miso.verification import checks, rows
from trl_miso.verification.checks import exact_log_probs
from trl_miso.verification.rows import choose, example_of

__all__ = ["make_trainer"]  # a fixture

LARGE = 262_144  # tokens of Gemma 3


# The reference


def summed_exactly(logits, label):
    """The log-probability of a label, with a sum that is rounded once."""
    values = logits.double()
    return float(values[label]) - math.log(math.fsum(values.exp().tolist()))


def test_the_reference_is_exact_with_a_large_vocabulary():
    model = tiny_model("llama", vocab_size=LARGE)
    ids = torch.randint(LARGE, (1, 6))
    with torch.no_grad():
        logits = 20 * model(input_ids=ids).logits[0]
    labels = torch.tensor([-100, 5, LARGE - 1, -100, 0, 77_777])
    exact = [summed_exactly(logits[at], labels[at]) for at in (1, 2, 4, 5)]
    torch.testing.assert_close(
        exact_log_probs(logits, labels), torch.tensor(exact, dtype=torch.float64), rtol=0, atol=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(2, 3000) | st.just(LARGE),
    tokens=st.integers(1, 5),
    at_once=st.integers(1, 10_000),
    scale=st.sampled_from([0.1, 3, 30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_reference_is_exact_for_every_vocabulary(size, tokens, at_once, scale, dtype, seed):
    """Also in pieces of any size, of which each has a token at least."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(tokens, size, generator=generator)).to(dtype)
    labels = torch.randint(size, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.3] = -100
    labels[-1] = 0
    exact = [summed_exactly(row, label) for row, label in zip(logits, labels, strict=True) if label != -100]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "_LOGITS_AT_ONCE", at_once)
        found = exact_log_probs(logits, labels)
    torch.testing.assert_close(found, torch.tensor(exact, dtype=torch.float64), rtol=1e-13, atol=1e-12)


def test_the_check_of_the_loss_compares_with_the_reference(make_trainer, monkeypatch):
    monkeypatch.setattr(checks, "exact_log_probs", lambda *args: exact_log_probs(*args) + 1e-3)
    trainer = make_trainer()
    with pytest.raises(ValueError, match="loss matches the model's logits +failed +0.001 nats"):
        trainer.run_checks(2, gradients=False)
    assert [check.name for check in trainer.verification if check.status == "failed"] == NAMES[:1]


# The rows


def row(contexts, output):
    """A prepared row with contexts of these lengths (none: plain) and an output."""
    if contexts:
        weights = [1 / len(contexts)] * len(contexts)
        example = parallel([[n] * size for n, size in enumerate(contexts)], output, weights, "aligned")[1]
    else:
        example = single(output)
    ids = list(range(2, 2 + example.num_tokens))
    return {"input_ids": ids, "labels": ids, "miso_layout": encode(example)}


lengths = st.lists(st.integers(1, 30), min_size=2, max_size=4)


@given(
    several=st.lists(st.tuples(lengths, st.integers(2, 20)), max_size=8),
    plain=st.lists(st.integers(2, 100), max_size=8),
    count=st.integers(1, 6),
    longest=st.sampled_from([rows.LONGEST, 60]),
    random=st.randoms(use_true_random=False),
)
def test_short_rows_are_chosen(several, plain, count, longest, random):
    """In any order of the rows: the shortest with several contexts and at most `LONGEST` tokens, then the shortest without.

    Of more than two rows one is long.
    """
    given_rows = [row(*each) for each in several] + [row((), output) for output in plain]
    random.shuffle(given_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "LONGEST", longest)
        chosen = [example_of(each) for each in choose(given_rows, count)]
    every = [example_of(each) for each in given_rows]
    assert len(chosen) == min(count, len(every))
    assert any(each.branches for each in chosen) == bool(several and count)
    assert [bool(each.branches) for each in chosen] == sorted((bool(each.branches) for each in chosen), reverse=True)
    sizes = sorted(each.num_unshared_tokens for each in every if each.branches and each.num_unshared_tokens <= longest)
    taken = sorted(each.num_unshared_tokens for each in chosen if each.branches)
    if len(sizes) >= count:
        assert taken == (sizes[:count] if count <= 2 else [*sizes[: count - 1], sizes[-1]])
    elif sizes:
        fitting = sorted(n for e in every if not e.branches and (n := e.num_unshared_tokens) <= longest)
        assert taken[: len(sizes)] == sizes
        rest = sorted(each.num_unshared_tokens for each in chosen if not each.branches)
        assert rest[: len(fitting)] == fitting[: count - len(sizes)]


def forwarded_tokens(trainer, **options):
    """Tokens that the model is given by the checks."""
    counts = []
    hook = trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trainer.run_checks(2, **options)
    hook.remove()
    return sum(counts)


# What they took


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "trl_miso")
    return lambda: [record.getMessage() for record in caplog.records if "Verified" in record.getMessage()]


def test_training_says_what_the_checks_took(make_trainer, log):
    trainer = make_trainer(verify=True, max_steps=1)
    several = [each for each in trainer.train_dataset if example_of(each).branches]
    shortest = sorted(several, key=lambda each: example_of(each).num_unshared_tokens)[:2]
    trainer.train()
    (line,) = log()
    found = re.search(
        r"Verified on this model and 2 short rows \(([\d,]+) tokens, ([\d,]+) forwarded\) in \d+\.\d s: 8 checks passed "
        r"\(see trainer.verification\)\.$",
        line,
    )
    tokens, forwarded = (int(each.replace(",", "")) for each in found.groups())
    assert tokens == sum(len(each["input_ids"]) for each in shortest)
    assert forwarded == forwarded_tokens(trainer, gradients=False)


def test_without_labels_nothing_is_said_to_be_verified(make_trainer, log):
    trainer = make_trainer(verify=True, max_steps=1)
    trainer.train_dataset = trainer.train_dataset.map(lambda each: {"labels": [-100] * len(each["labels"])})
    assert trainer.run_checks(2, gradients=False) is None
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert log() == []


def test_the_table_says_what_the_checks_took(make_trainer, capsys, wide_terminal):
    make_trainer().verify(3)
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"on 3 rows \([\d,]+ tokens, [\d,]+ forwarded\) in \d+\.\d s", printed)


def test_the_command_says_what_the_checks_took(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trl-miso", "verify", "-n", "1", "--context_mode", "para"])
    main()
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"on 1 short row \([\d,]+ tokens, [\d,]+ forwarded\) in \d+\.\d s", printed)


# How far they are


@pytest.mark.parametrize("disabled", [False, True])
def test_a_bar_names_the_check_under_way(make_trainer, capfd, disabled):
    trainer = make_trainer(disable_tqdm=disabled)
    capfd.readouterr()
    trainer.run_checks(2, gradients=True)
    printed = capfd.readouterr().err
    assert [name in printed for name in NAMES] == [not disabled] * len(NAMES)
    assert bool(printed) != disabled
    places = [printed.index(f"Verifying: {name}") for name in NAMES if not disabled]
    assert places == sorted(places)


def test_other_processes_show_no_bar(make_trainer, capfd, monkeypatch):
    trainer = make_trainer(disable_tqdm=False)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    capfd.readouterr()
    trainer.run_checks(2, gradients=False)
    assert capfd.readouterr().err == ""
