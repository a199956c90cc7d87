"""Checks on a model leave it as it was, whatever its modules keep from a forward."""

from collections import Counter

import pytest
import torch
from torch import nn

from tests.support.models import tiny_model
from trl_miso import MISOSFTTrainer
from trl_miso.attention import register_miso_attention
from trl_miso.attention.state import AttentionState, in_eval_mode
from trl_miso.attention.support import prepare_model


class _Linear(nn.Linear):
    """A layer that keeps something of each forward in eval mode."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight
        self.weight.description = _Description()
        self.cache, self.sizes, self.seen, self.names = {}, [], set(), Counter()
        self.register_buffer("calls", torch.zeros(2, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        if not self.training:
            self.keep(x)
        return out

    def keep(self, x: torch.Tensor) -> None:
        raise NotImplementedError


class _Description:
    packed = False


class CachesInAttributes(_Linear):
    def keep(self, x):
        self.last = x
        self.cache[x.shape[1]] = x
        self.sizes.append(x.shape[1])
        self.seen.add(x.shape[1])
        self.names["forward"] += 1


class CountsInBuffers(_Linear):
    def keep(self, x):
        self.calls += 1


class ReplacesBuffers(_Linear):
    def keep(self, x):
        self.calls = self.calls + 1
        self.register_buffer("mask", torch.ones(3))


class PacksWeights(_Linear):
    def keep(self, x):
        if not self.weight.description.packed:
            self.weight.data = self.weight.data.bfloat16().float()
            self.weight.description.packed = True
            self.weight.format = "packed"


class SwitchesModes(_Linear):
    def keep(self, x):
        self.train()


KEEPING = [CachesInAttributes, CountsInBuffers, ReplacesBuffers, PacksWeights, SwitchesModes]


def _contents(model):
    """What each module holds, by value."""
    contents = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            # Which attention the model runs is what the checks put in.
            if key not in ("_modules", "_parameters", "_buffers", "miso_rotation", "config"):
                contents[name, key] = sorted(map(repr, value)) if isinstance(value, set) else repr(value)
        for key, tensor in [*module._buffers.items(), *module._parameters.items()]:
            if tensor is not None:
                description = getattr(tensor, "description", None)
                own = {k: repr(v) for k, v in vars(tensor).items() if k != "description"}
                contents[name, key] = tensor.tolist(), own, description and dict(vars(description))
    return contents


def _model(kind):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = kind(layer.mlp.down_proj)
        layer.self_attn.q_proj = kind(layer.self_attn.q_proj)
    model.train()
    model.model.layers[1].mlp.eval()  # as users do with parts that they freeze
    return model


@pytest.mark.parametrize("kind", KEEPING)
def test_modules_that_keep_something_of_a_forward(kind):
    """The property that the checks stand on; each kind does keep something without it."""
    model, ids = _model(kind), torch.arange(2, 12)[None]
    before = _contents(model)
    with in_eval_mode(model), torch.no_grad():
        model(ids, use_cache=False)
    assert _contents(model) == before
    model.eval()
    in_eval = _contents(model)
    with torch.no_grad():
        model(ids, use_cache=False)
    assert _contents(model) != in_eval


@pytest.mark.parametrize("kind", KEEPING)
def test_preparing_a_model_leaves_nothing_behind(kind):
    model = _model(kind)
    before = _contents(model)
    prepare_model(model, register_miso_attention(), 64)
    assert _contents(model) == before


@pytest.mark.parametrize("kind", KEEPING)
def test_verification_leaves_nothing_behind(kind, para_dataset, tokenizer, make_config):
    trainer = MISOSFTTrainer(_model(kind), make_config(), train_dataset=para_dataset, processing_class=tokenizer)
    before = _contents(trainer.model)
    trainer.verify(2)
    assert _contents(trainer.model) == before


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_states_of_attention_are_put_in_force_and_taken_away(name):
    model = tiny_model(name)
    ordinary = _contents(model), model.config._attn_implementation
    prepare_model(model, register_miso_attention(), 64)
    mixing = AttentionState.of(model)
    assert any("miso_rotation" in vars(module) for module in model.modules())
    mixing.ordinary.set()
    assert (_contents(model), model.config._attn_implementation) == ordinary
    assert not any("miso_rotation" in vars(module) for module in model.modules())
    mixing.set()
    assert AttentionState.of(model) == mixing == mixing.now()
