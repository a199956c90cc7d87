"""Adapters train as the method defines, with a frozen base, and are saved, reloaded, merged and used without this package."""

import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset

from tests.support.models import tiny_model
from tests.support.rows_oracle import rows_loss
from trl_miso import MISOSFTTrainer
from trl_miso.segments import encode, parallel

peft = pytest.importorskip("peft")

METHODS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
IDS = torch.arange(5, 25)[None]


def _adapter(method, **options):
    return peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"], **METHODS[method] | options
    )


def _checkpointing(reentrant):
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}


def _losses(trainer):
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("method", METHODS)
def test_one_step_equals_one_row_per_context(tokenizer, make_config, method, reentrant):
    """The loss and the gradient of every adapter weight, for adapters that are not zero at the start."""
    contexts = [[[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8], [5, 6, 20, 21, 22]], [[30, 31, 32], [30, 40, 41, 42, 43, 44]]]
    outputs, weights = [[2, 60, 61, 62], [2, 63, 64, 65, 66]], [[0.5, 0.3, 0.2], [0.5, 0.5]]
    rows = []
    for parts, output, shares in zip(contexts, outputs, weights, strict=True):
        tokens, example = parallel(parts, len(output), shares, "successive")
        labels = [-100] * len(tokens) + [-100, *output[1:]]
        rows.append({"input_ids": tokens + output, "labels": labels, "miso_layout": encode(example)})
    model = peft.get_peft_model(tiny_model("llama"), _adapter(method, init_lora_weights=False))
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = sum(
        rows_loss(model, parts, output, [-100, *output[1:]], shares)
        for parts, output, shares in zip(contexts, outputs, weights, strict=True)
    )
    expected = total / sum(len(output) - 1 for output in outputs)
    gradients = torch.autograd.grad(expected, list(adapters.values()))
    before = [p.detach().clone() for p in adapters.values()]
    model.set_attn_implementation("sdpa")
    options = {} if reentrant is None else _checkpointing(reentrant)
    config = make_config(max_steps=1, optim="sgd", learning_rate=0.5, max_grad_norm=0.0, **options)
    trainer = MISOSFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    assert trainer.data_collator.share_prefixes
    torch.testing.assert_close(_losses(trainer), expected.detach()[None].float(), rtol=0, atol=1e-5)
    for (name, p), old, gradient in zip(adapters.items(), before, gradients, strict=True):
        scale = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(
            (old - p.detach()) / 0.5 / scale, gradient / scale, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert gradient.abs().max() > 1e-3, name


def _reload(folder, methods):
    """Logits of each method's adapter on the base model and of its merged model, in a process without this package."""
    code = """
import sys
sys.modules["trl_miso"] = None  # importing it raises
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder, *methods = sys.argv[1:]
ids = torch.arange(5, 25)[None]
logits = {}
for method in methods:
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, f"{folder}/{method}/adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(f"{folder}/{method}/merged").eval()(ids).logits
    logits[method] = adapted, merged
torch.save(logits, f"{folder}/logits.pt")
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, str(folder), *methods]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(folder / "logits.pt")


def test_adapters_are_used_without_this_package(para_dataset, tokenizer, make_config, tmp_path):
    """The base stays frozen. The saved adapter on its base, and the merged model, give the logits of the trained model."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    expected = {}
    for method in METHODS:
        model = tiny_model("llama").eval()
        frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            untrained = model(IDS).logits
        options = {"model": model, "train_dataset": para_dataset, "processing_class": tokenizer}
        config = make_config(max_steps=6, learning_rate=1e-2)
        trainer = MISOSFTTrainer(**options, args=config, peft_config=_adapter(method))
        losses = _losses(trainer)
        assert losses[-1] < losses[0]
        for name, p in model.named_parameters():
            assert "lora" in name or torch.equal(p, frozen[name.replace(".base_layer", "")]), name
        trainer.save_model(str(tmp_path / method / "adapter"))
        with torch.no_grad():
            expected[method] = trainer.model.eval()(IDS).logits
        assert (expected[method] - untrained).abs().max() > 0.1
        trainer.model.merge_and_unload().save_pretrained(tmp_path / method / "merged")
        assert "miso" not in (tmp_path / method / "merged" / "config.json").read_text()
    for method, (adapted, merged) in _reload(tmp_path, METHODS).items():
        torch.testing.assert_close(adapted, expected[method], rtol=0, atol=1e-5, msg=lambda m, n=method: f"{n}: {m}")
        torch.testing.assert_close(
            merged, expected[method], rtol=0, atol=1e-4, msg=lambda m, n=method: f"{n}, merged: {m}"
        )
