"""After training the model is an ordinary one in memory, and trainers that share a model each train as they were asked to."""

import copy
import functools
import os
import pickle
import subprocess
import sys

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from tests.support.models import tiny_model
from trl_miso import MISOSFTConfig, MISOSFTTrainer

IDS = torch.arange(5, 25)[None]


@pytest.fixture
def trainer_of(para_dataset, tokenizer, make_config):
    def make(model, cls=MISOSFTTrainer, **options):
        config = make_config(SFTConfig if cls is SFTTrainer else MISOSFTConfig, **options)
        rows = para_dataset.select_columns(["prompt", "completion"]) if cls is SFTTrainer else para_dataset
        return cls(model, config, train_dataset=rows, processing_class=tokenizer)

    return make


def _adapted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def _foreign(model):
    """Attributes and settings of the model that come from this package."""
    found = []
    for name, module in model.named_modules():
        found += [
            (name, key) for key, value in vars(module).items() if "miso" in key or "trl_miso" in type(value).__module__
        ]
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values()]
        found += [(name, hook) for hook in hooks if "miso" in getattr(hook, "__module__", "")]
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", "")
        found += [(name, implementation)] if "miso" in implementation else []
    return found


@pytest.mark.parametrize("wrap", [lambda model: model, _adapted], ids=["full", "lora"])
@pytest.mark.parametrize("end", ["trained", "evaluated", "failed"])
def test_nothing_of_this_package_stays_in_the_model(trainer_of, para_dataset, wrap, end):
    model = wrap(tiny_model("gemma3", sliding_window=512))
    trainer = trainer_of(model, verify=True)
    if end == "failed":
        trainer.create_optimizer = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    else:
        trainer.train()
    if end == "evaluated":
        trainer.evaluate(trainer.train_dataset)
        trainer.predict(trainer.train_dataset)
        trainer.verify(2)
    assert _foreign(model) == []


_IN_ANOTHER_PROCESS = """
import sys
sys.modules["trl_miso"] = None  # importing it raises
import torch
model = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    print(model(torch.arange(5, 25)[None]).logits.double().sum().item())
"""


def test_the_model_is_loaded_by_torch_in_another_process(trainer_of, tmp_path):
    """`torch.save` of the whole model, pickle and deepcopy, as after SFTTrainer."""
    trainer = trainer_of(tiny_model("llama"), gradient_checkpointing=False)
    trainer.train()
    model = trainer.model.eval()
    with torch.no_grad():
        expected = model(IDS).logits
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(IDS).logits, expected)
    torch.save(model, tmp_path / "model.pt")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _IN_ANOTHER_PROCESS, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(expected.double().sum().item(), abs=1e-4)


@pytest.mark.parametrize("wrap", [lambda model: model, _adapted], ids=["full", "lora"])
def test_a_copy_of_the_model_has_weights_of_its_own(trainer_of, para_dataset, wrap):
    """Also where the trainer computed after training, and where the model goes on to change."""
    trainer = trainer_of(wrap(tiny_model("llama")), gradient_checkpointing=False)
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    model = trainer.model.eval()
    with torch.no_grad():
        expected = model(IDS).logits
        copied = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(IDS).logits, expected)
        assert not torch.equal(model(IDS).logits, expected)


def test_a_forward_that_the_user_set_stays(trainer_of):
    model = tiny_model("llama")
    own = model.forward = functools.partial(type(model).forward, model)
    trainer = trainer_of(model)
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    assert vars(model)["forward"] is own


def test_sft_goes_on_with_the_model(trainer_of):
    """SFTTrainer after MISOSFTTrainer, on the same model, trains as it does on a copy that was saved and loaded."""
    model = tiny_model("llama")
    trainer_of(model).train()
    fresh = tiny_model("llama")
    fresh.load_state_dict(model.state_dict())
    losses = []
    for start in (fresh, model):
        trainer = trainer_of(start, SFTTrainer)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def _loss(trainer):
    batch = trainer.data_collator(list(trainer.train_dataset.select(range(4))))
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, batch, num_items_in_batch=(batch["labels"] != -100).sum()).item()


def test_trainers_on_one_model_each_honour_their_own_request(trainer_of):
    """Made one after the other, used in turn: the losses are those of a trainer alone on a model."""
    requests = [
        {"context_weighting": "uniform", "attention_kernel": "reference"},
        {"context_weighting": "fid", "attention_kernel": "cpu", "share_prefixes": False},
        {"full_context_weight": 0.75, "output_positions": "after_longest"},
    ]
    alone = [_loss(trainer_of(tiny_model("llama"), **request)) for request in requests]
    model = tiny_model("llama")
    trainers = [trainer_of(model, learning_rate=0.0, **request) for request in requests]
    expected = pytest.approx(alone, abs=1e-5)
    assert [_loss(trainer) for trainer in trainers] == expected
    assert [_loss(trainer) for trainer in trainers[::-1]][::-1] == expected
    names = []
    for trainer in trainers:
        trainer.training_step = _recording(trainer, names)
        trainer.train()
    assert names == [name for name in ("miso_torch_reference", "miso_torch_cpu", "miso_torch_auto") for _ in range(2)]
    assert [_loss(trainer) for trainer in trainers] == expected
    assert _foreign(model) == []


def _recording(trainer, names):
    step = trainer.training_step

    def training_step(*args, **kwargs):
        names.append(trainer.model.config._attn_implementation)
        return step(*args, **kwargs)

    return training_step


def test_a_trainer_that_evaluates_within_anothers_training(trainer_of):
    """A callback may evaluate with a second trainer on the same model."""
    from transformers import TrainerCallback

    model = tiny_model("llama")
    inner = trainer_of(model, context_weighting="fid", attention_kernel="reference")
    outer = trainer_of(model, learning_rate=0.0, max_steps=3)
    expected = [_loss(inner), _loss(outer)]
    seen = []

    class Evaluate(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append([_loss(inner), _loss(outer)])

    outer.add_callback(Evaluate())
    outer.train()
    assert len(seen) == 3
    for losses in seen:
        assert losses == pytest.approx(expected, abs=1e-6)
