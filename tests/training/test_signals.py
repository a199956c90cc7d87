"""SIGTERM and Ctrl-C, at any moment: the work is kept, and training ends soon."""

import os
import signal
import threading
import types

import pytest
import torch
from transformers import TrainerCallback

from tests.support.models import tiny_model
from tests.support.processes import PROCESSES
from tests.training.test_interruption import two_ranks
from trl_miso import MISOEvalCallback, MISOSFTTrainer
from trl_miso.training import interruption, reliability
from trl_miso.training.interruption import TrainingGuard

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(autouse=True)
def _python_s_own_handlers():
    """A shell lets what it starts in the background ignore Ctrl-C."""
    before = {number: signal.getsignal(number) for number in CODES}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


class At(TrainerCallback):
    """Sends a signal at the `nth` call of a callback method."""

    def __init__(self, method, nth, number=signal.SIGTERM):
        self.calls, self.nth, self.number = 0, nth, number
        setattr(self, method, self.call)

    def call(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.nth:
            send(self.number)


@pytest.fixture
def make(para_dataset, tokenizer, make_config, tmp_path):
    def make(callback=None, trainer_class=MISOSFTTrainer, **options):
        defaults = {"max_steps": 10, "save_strategy": "steps", "save_steps": 100, "output_dir": str(tmp_path / "out")}
        config = make_config(**defaults | options)
        rows = para_dataset.select(range(12))
        evaluation = rows if config.eval_strategy != "no" else None
        return trainer_class(
            tiny_model("llama"),
            config,
            train_dataset=rows,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            callbacks=[callback] if callback else [],
        )

    return make


def end_of(trainer, resume=None):
    """The exit status of `train()`, and the steps with a checkpoint."""
    handlers = [signal.getsignal(number) for number in CODES]
    with pytest.raises(SystemExit) as end:
        trainer.train(resume_from_checkpoint=resume)
    assert [signal.getsignal(number) for number in CODES] == handlers
    folder = trainer.args.output_dir
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return end.value.code, sorted(int(name.split("-")[1]) for name in names if name.startswith("checkpoint-"))


@pytest.mark.parametrize("number", CODES)
def test_in_a_step(make, number):
    """The step is finished and saved, and a resumed run ends as one that was not interrupted."""
    trainer = make(At("on_step_begin", 2, number), max_steps=4)
    assert end_of(trainer) == (CODES[number], [2])
    again = make(max_steps=4)
    again.train(resume_from_checkpoint=True)
    uninterrupted = make(max_steps=4, output_dir=trainer.args.output_dir + "2")
    uninterrupted.train()
    for p, q in zip(again.model.parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_whatever_a_subclass_overrides(make):
    """`compute_loss` and `training_step` without `super()`."""

    class Own(MISOSFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = {name: x for name, x in inputs.items() if name != "miso_rows"}
            loss = model(**inputs).loss
            return (loss, {}) if return_outputs else loss

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            loss.backward()
            return loss.detach()

    assert end_of(make(At("on_step_begin", 2), trainer_class=Own)) == (143, [2])


@pytest.mark.parametrize("number", CODES)
def test_in_an_evaluation(make, number):
    """No step is under way: the evaluation is left at once, and the step before is saved."""
    batches = []
    callback = At("on_prediction_step", 2, number)
    trainer = make(callback, eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=1)
    real = trainer.prediction_step
    trainer.prediction_step = lambda *args, **kwargs: batches.append(1) or real(*args, **kwargs)
    assert end_of(trainer) == (CODES[number], [3])
    assert len(batches) == 2


def test_in_the_first_evaluation(make):
    """`eval_on_start`: no step was made, so nothing is saved."""
    callback = At("on_prediction_step", 2)
    assert end_of(make(callback, eval_strategy="steps", eval_steps=3, eval_on_start=True)) == (143, [])


@pytest.mark.parametrize(
    ("method", "options", "resumes"),
    [("on_step_end", {}, True), ("on_step_end", {"save_only_model": True}, False), ("on_train_begin", {}, False)],
)
def test_the_log_says_how_training_continues(make, monkeypatch, method, options, resumes):
    """From a checkpoint only if there is one with an optimizer state."""
    said = []
    monkeypatch.setattr(reliability.logger, "warning", lambda text, *args, **kwargs: said.append(text))
    end_of(make(At(method, 1), max_steps=2, **options))
    assert ("continues with resume_from_checkpoint=True" in said[-1]) == resumes
    if resumes:
        make(max_steps=2).train(resume_from_checkpoint=True)
        return
    assert "has to start from the beginning" in said[-1] and ("save_only_model" in said[-1]) == bool(options)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make(max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("where", ["an evaluation", "the end"])
def test_in_generation(make, where):
    """MISOEvalCallback is left at once, in an evaluation and after the last step."""
    trainer = make(eval_strategy="steps" if where == "an evaluation" else "no", eval_steps=2, max_steps=3)
    callback = MISOEvalCallback(trainer, [{"prompt": "Hello"}], lambda row, response: [True], max_new_tokens=400)
    trainer.add_callback(callback)
    tokens = []

    def count(module, args, kwargs):
        if kwargs.get("use_cache"):
            tokens.append(1)
            if len(tokens) == 40:
                send(signal.SIGTERM)

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    assert end_of(trainer) == (143, [2 if where == "an evaluation" else 3])
    assert len(tokens) == 40


def test_in_the_checks_before_training(make, monkeypatch):
    checked = []
    trainer = make(verify=True)
    trainer.model.register_forward_pre_hook(lambda *args: checked.append(1) or (len(checked) == 3 and send(15)) or None)
    assert end_of(trainer) == (143, [])
    assert len(checked) == 3


def test_while_a_checkpoint_is_saved(make, monkeypatch):
    """It is completed, and no other step is made."""
    trainer = make(save_steps=2)
    real = trainer._save_optimizer_and_scheduler
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", lambda *args: send(signal.SIGTERM) or real(*args))
    assert end_of(trainer) == (143, [2])
    assert trainer.state.global_step == 2


def test_a_resumed_run_that_makes_no_step_saves_none(make):
    make(max_steps=2, save_steps=2).train()
    trainer = make(max_steps=4, verify=True)
    trainer.model.register_forward_pre_hook(lambda *args: send(signal.SIGTERM))
    assert end_of(trainer, resume=True) == (143, [2])


def test_after_the_last_step(make, monkeypatch):
    """No training is left: the signal does what it would do without a trainer, once `train()` returns."""
    sent = []
    own = types.SimpleNamespace(getpid=os.getpid, kill=lambda process, number: sent.append(number))
    monkeypatch.setattr(interruption, "os", own)
    trainer = make(At("on_train_end", 1), max_steps=1)
    trainer.train()
    assert sent == [signal.SIGTERM]


def _told_twice(folder):
    """A step that never ends, and two Ctrl-C."""
    from tests.support.rank_runs import AtStep, make_trainer

    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = make_trainer(folder)

    def hang():
        send(signal.SIGINT)
        (folder / "once").touch()
        send(signal.SIGINT)
        (folder / "twice").touch()

    trainer.add_callback(AtStep(1, hang))
    trainer.train()


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    process = PROCESSES.Process(target=_told_twice, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGINT
    assert [path.name for path in sorted(tmp_path.glob("*ce"))] == ["once"]


def test_a_thread_handles_no_signals(make):
    """Python allows handlers in the main thread alone; training elsewhere works."""
    trainer = make(max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


def test_in_an_evaluation_of_two_ranks(tmp_path):
    """Rank 1 alone receives it, in its second batch: both leave at that batch and save together."""
    assert two_ranks("sigterm_in_evaluation", tmp_path) == [(143, 1, ["checkpoint-1"], 2)] * 2


def test_in_generation_of_two_ranks(tmp_path):
    """Rank 1 alone receives it: both leave after that batch, also where one has a batch more, and save together."""
    assert two_ranks("sigterm_in_generation", tmp_path) == [(143, 1, ["checkpoint-1"], 2)] * 2


def test_ranks_agree_once_a_step(make, monkeypatch):
    """Not once a batch: gradient accumulation costs no more of it."""
    calls = []
    real = TrainingGuard._agree
    monkeypatch.setattr(TrainingGuard, "_agree", lambda self: calls.append(1) or real(self))
    make(max_steps=2, gradient_accumulation_steps=3, save_strategy="no").train()
    assert len(calls) == 2
