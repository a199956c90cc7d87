"""Adapters train as the method defines, with a frozen base, and are saved, reloaded, merged and used without this package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

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


def _weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


class _Keep(TrainerCallback):
    """Keeps the trained weights of every step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights[state.global_step] = {
            n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
        }


@pytest.mark.parametrize("names", [["default"], ["crab"], ["default", "crab"], ["crab", "other"]], ids="+".join)
def test_the_best_adapter_is_loaded_at_the_end(para_dataset, tokenizer, make_config, names):
    """Whatever its name, and beside a second one. The highest loss counts as the best: that of an early step."""
    model = peft.get_peft_model(tiny_model("llama"), _adapter("lora"), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, _adapter("lora"))
    model.set_adapter(names[-1])
    config = make_config(
        max_steps=3,
        learning_rate=3e-2,
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer = MISOSFTTrainer(
        model,
        config,
        train_dataset=para_dataset,
        eval_dataset=para_dataset.select(range(4)),
        processing_class=tokenizer,
    )
    keep = _Keep()
    trainer.add_callback(keep)
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 3 and keep.weights[best].keys() == _weights(trainer).keys()
    for name, weight in _weights(trainer).items():
        assert torch.equal(weight, keep.weights[best][name]), name


@pytest.mark.parametrize("name", ["default", "crab"])
def test_training_resumes_with_an_adapter_of_any_name(para_dataset, tokenizer, make_config, name):
    weights = []
    for resume in (None, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model("llama"), _adapter("lora"), adapter_name=name)
        config = make_config(max_steps=4, learning_rate=1e-2, save_strategy="steps", save_steps=2)
        trainer = MISOSFTTrainer(model, config, train_dataset=para_dataset, processing_class=tokenizer)
        if resume:
            shutil.rmtree(Path(config.output_dir) / "checkpoint-4")
        trainer.train(resume_from_checkpoint=resume)
        weights.append(_weights(trainer))
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


TIED = [
    lambda: _adapter("lora", trainable_token_indices=[5, 6]),
    lambda: _adapter("lora", trainable_token_indices={"embed_tokens": [5, 6]}),
    lambda: peft.TrainableTokensConfig(token_indices=[5, 6]),
]


@pytest.mark.parametrize("given", ["peft_config", "model"])
@pytest.mark.parametrize("adapter", TIED)
def test_trained_tokens(para_dataset, tokenizer, make_config, adapter, given):
    """Refused where input and output share a weight, before the data are prepared; trained where they do not."""
    for tied in (True, False):
        model, options = tiny_model("llama", tie_word_embeddings=tied), {"peft_config": adapter()}
        if given == "model":
            model, options = peft.get_peft_model(model, adapter()), {}
        arguments = {"args": make_config(), "train_dataset": para_dataset, "processing_class": tokenizer, **options}
        if tied:
            with pytest.raises(
                ValueError, match="(?s)Got an adapter with trained token.*expected.*Fix: .*ensure_weight_tying"
            ):
                MISOSFTTrainer(model, **arguments)
            continue
        trainer = MISOSFTTrainer(model, **arguments)
        before = _weights(trainer)
        trainer.train()
        assert not any(torch.equal(before[name], weight) for name, weight in _weights(trainer).items())


def test_the_whole_tied_embedding_is_trained_as_the_error_says(para_dataset, tokenizer, make_config):
    adapter = _adapter("lora", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = tiny_model("llama", tie_word_embeddings=True)
    trainer = MISOSFTTrainer(
        model, make_config(verify=True), train_dataset=para_dataset, processing_class=tokenizer, peft_config=adapter
    )
    before = _weights(trainer)
    trainer.train()
    assert not any(torch.equal(before[name], weight) for name, weight in _weights(trainer).items())
    base = trainer.model.get_base_model()
    assert torch.equal(base.get_input_embeddings().weight, base.get_output_embeddings().weight)


@pytest.mark.parametrize("given", ["peft_config", "model"])
def test_adaption_prompt_is_refused(para_dataset, tokenizer, make_config, given):
    adapter = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    model, options = tiny_model("llama"), {"peft_config": adapter}
    if given == "model":
        model, options = peft.get_peft_model(model, adapter), {}
    with pytest.raises(ValueError, match="(?s)Got PEFT's AdaptionPrompt.*expected.*Fix: use LoRA"):
        MISOSFTTrainer(model, make_config(), train_dataset=para_dataset, processing_class=tokenizer, **options)


# Adapters in which the rows of a packed batch see each other. They are zero, and without effect, before the first step.
BY_BATCH = {
    "aLoRA": lambda: _adapter("lora", alora_invocation_tokens=[4], task_type="CAUSAL_LM"),
    "Lily": lambda: peft.LilyConfig(target_modules=["q_proj"]),
}


@pytest.mark.parametrize("given", ["peft_config", "model"])
@pytest.mark.parametrize("method", BY_BATCH)
def test_adapters_in_which_rows_see_each_other_are_refused(para_dataset, tokenizer, make_config, method, given):
    if method == "Lily" and not hasattr(peft, "LilyConfig"):
        pytest.skip("this PEFT has no LilyConfig")
    model, options = tiny_model("llama"), {"peft_config": BY_BATCH[method]()}
    if given == "model":
        model, options = peft.get_peft_model(model, BY_BATCH[method]()), {}
    with pytest.raises(ValueError, match=f"(?s)Got PEFT's {method}.*Expected.*Fix: use LoRA"):
        MISOSFTTrainer(model, make_config(), train_dataset=para_dataset, processing_class=tokenizer, **options)


@pytest.mark.parametrize("method", BY_BATCH)
def test_the_checks_see_what_adapters_will_do(para_dataset, tokenizer, make_config, method, monkeypatch):
    """Also adapters of a kind that is not known by name fail them, before they have learned anything."""
    if method == "Lily" and not hasattr(peft, "LilyConfig"):
        pytest.skip("this PEFT has no LilyConfig")
    monkeypatch.setattr("trl_miso.training.guards.check_adapters", lambda *_: None)
    trainer = MISOSFTTrainer(
        tiny_model("llama"),
        make_config(),
        train_dataset=para_dataset,
        processing_class=tokenizer,
        peft_config=BY_BATCH[method](),
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match="Got a model on which MISO is not exact"):
        trainer.verify()
    assert {check.name for check in trainer.verification if check.status == "failed"} >= {"packing changes nothing"}
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name


# Every method of PEFT that changes weights, with the sizes of a tiny layer.
OTHERS = {
    "AdaLoraConfig": {"total_step": 10},
    "BOFTConfig": {"boft_block_size": 16},
    "C3AConfig": {"block_size": 16},
    "DeloraConfig": {},
    "FourierFTConfig": {"n_frequency": 100},
    "GraloraConfig": {},
    "HRAConfig": {},
    "IA3Config": {"feedforward_modules": []},
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
    "LoHaConfig": {},
    "LoKrConfig": {},
    "MissConfig": {},
    "OFTConfig": {"oft_block_size": 16, "r": 0},
    "RandLoraConfig": {},
    "RoadConfig": {"group_size": 16},
    "ShiraConfig": {"r": 4},
    "VBLoRAConfig": {"num_vectors": 16, "vector_length": 16},
    "VeraConfig": {},
    "WaveFTConfig": {"n_frequency": 100},
}


@pytest.mark.parametrize("method", OTHERS)
def test_every_method_trains_all_of_its_weights(para_dataset, tokenizer, make_config, method):
    """And passes the checks on the model as it is wrapped."""
    if not hasattr(peft, method):
        pytest.skip(f"this PEFT has no {method}")
    adapter = getattr(peft, method)(**{"target_modules": ["q_proj", "v_proj"]} | OTHERS[method])
    config = make_config(max_steps=2, learning_rate=1e-2, verify=True)
    trainer = MISOSFTTrainer(
        tiny_model("llama"), config, train_dataset=para_dataset, processing_class=tokenizer, peft_config=adapter
    )
    before = _weights(trainer)
    trainer.train()
    assert before and not any(torch.equal(before[name], weight) for name, weight in _weights(trainer).items())
    assert {check.status for check in trainer.verification} == {"passed"}
