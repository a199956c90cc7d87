"""The Trainer layer that knows no MISO: it works over any Trainer, and its place among the mixins is fixed."""

import ast
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.support.models import tiny_model
from trl_miso import MISOSFTTrainer
from trl_miso.training import checkpoints, interruption, kept_settings, reliability, streams
from trl_miso.training.interruption import NonFiniteError
from trl_miso.training.reliability import ReliableTrainer


class PlainTrainer(ReliableTrainer, Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.guard_training()


@pytest.fixture
def trainer(tmp_path):
    rows = [
        {"input_ids": torch.tensor([i, i + 1, i + 2]), "labels": torch.tensor([i, i + 1, i + 2])} for i in range(4, 20)
    ]
    settings = {"max_steps": 3, "save_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, **settings)
    return PlainTrainer(tiny_model("llama"), args, train_dataset=rows)


def defining(method):
    """The classes that define a method, in the order in which `super()` reaches them."""
    return [cls.__name__ for cls in MISOSFTTrainer.__mro__ if method in vars(cls)]


@pytest.mark.parametrize(
    ("method", "order"),
    [
        # A checkpoint is complete before it is pushed.
        ("_push_from_checkpoint", ["AtomicCheckpoints", "HubPushes", "Trainer"]),
        ("_save_checkpoint", ["AtomicCheckpoints", "SFTTrainer", "Trainer"]),
        # After SIGTERM nothing is scored; otherwise scores come before trackers learn that training ends.
        ("_finalize_training", ["ReliableTrainer", "ScoredEvaluations", "Trainer"]),
        # The loss is checked after all of its terms are computed.
        ("compute_loss", ["MISOSFTTrainer", "ReliableTrainer", "SFTTrainer", "Trainer"]),
        ("train", ["MISOSFTTrainer", "ReliableTrainer", "Trainer"]),
    ],
)
def test_order_of_the_mixins(method, order):
    assert [name for name in defining(method) if name in order] == order
    first = defining(method)[: len(order) - 1]
    assert first == order[:-1], "no other class may come in between"


@pytest.mark.parametrize("module", [reliability, checkpoints, interruption, kept_settings, streams])
def test_it_knows_no_miso(module):
    source = Path(module.__file__).read_text()
    modules = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    own = {module for module in modules if module.startswith("trl_miso")}
    layer = {f"trl_miso.training.{name}" for name in ("checkpoints", "interruption", "kept_settings", "streams")}
    assert own <= {"trl_miso.data.mapping"} | layer


def test_any_trainer_resumes_from_complete_checkpoints(trainer, tmp_path):
    trainer.train()
    assert trainer.last_saved_step == 3
    assert not trainer.terminated
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    trainer.train(resume_from_checkpoint=True)
    losses = [entry["step"] for entry in trainer.state.log_history if "train_loss" in entry]
    assert trainer.state.global_step == 3 and losses


def test_any_trainer_stops_before_a_nan_reaches_the_weights(trainer, monkeypatch):
    monkeypatch.setattr(
        Trainer, "compute_loss", lambda self, *args, **kwargs: torch.tensor(float("nan"), requires_grad=True)
    )
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(NonFiniteError, match="rows without numbers"):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))


def test_what_trains_nothing_is_refused(trainer):
    """Also with checkpointing, whose recomputation makes a loss of frozen weights look trainable."""
    trainer.model.requires_grad_(False)
    with pytest.raises(
        ValueError, match="(?s)none of whose parameters requires a gradient, expected.*is_trainable=True"
    ):
        trainer.train()
    trainer.model.enable_input_require_grads()
    with pytest.raises(ValueError, match="none of whose parameters requires a gradient"):
        trainer.train()


def test_an_optimizer_that_holds_nothing_is_refused(trainer):
    other = tiny_model("llama")
    trainer.optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="(?s)an optimizer that holds none of.*expected.*Fix"):
        trainer.train()


def test_a_first_step_without_gradients_is_said(trainer, monkeypatch):
    said = []
    monkeypatch.setattr(interruption.logger, "warning", lambda text, *args: said.append(text))
    real = Trainer.compute_loss
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, *args, **kwargs: 0 * real(self, *args, **kwargs))
    trainer.train()
    assert len(said) == 1 and "gradients of the first step are all zero" in said[0]
