"""Weights that bitsandbytes has quantized are trained exactly, or refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from tests.support.models import tiny_model
from trl_miso import MISOSFTTrainer

bnb = pytest.importorskip("bitsandbytes", reason="quantized weights need bitsandbytes")
peft = pytest.importorskip("peft")

IDS = torch.arange(5, 25)[None]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@pytest.fixture(params=[False, True])
def avx512bf16(request, monkeypatch):
    """Whether the CPU has AVX512-BF16, where bitsandbytes packs weights in the first forward in eval mode."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: request.param)
    return request.param


def _lora(**options):
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"], **options)


def _losses(trainer):
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def _norms(trainer):
    trainer.train()
    return [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]


def _loaded(folder, **options):
    tiny_model("llama").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))


def test_plain_rows_on_4bit_weights_equal_sft(para_dataset, tokenizer, make_config, tmp_path, avx512bf16):
    """Losses and gradient norms of MISO in single equal SFTTrainer's, checks before training included."""
    rows = para_dataset.select_columns(["prompt", "completion"])
    options = {"max_steps": 3, "learning_rate": 1e-2}
    logs = []
    for cls, config in (
        (SFTTrainer, make_config(SFTConfig, **options)),
        (MISOSFTTrainer, make_config(verify=True, context_mode="single", **options)),
    ):
        torch.manual_seed(0)
        trainer = cls(
            _loaded(tmp_path / "base", **NF4),
            config,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=_lora(),
        )
        norms = _norms(trainer)
        logs.append([*norms, *(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)])
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


def test_packed_weights_are_refused(para_dataset, tokenizer, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = _loaded(tmp_path / "base", **NF4)
    layer = next(module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit))
    data, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = data, state
    with pytest.raises(ValueError, match="(?s)Got.*packed for inference.*expected.*Fix: load the model again"):
        MISOSFTTrainer(
            model, make_config(), train_dataset=para_dataset, processing_class=tokenizer, peft_config=_lora()
        )


@pytest.mark.parametrize("given", ["model", "quantization_config", "model_init_kwargs"])
def test_outlier_columns_are_refused(para_dataset, tokenizer, make_config, tmp_path, given):
    """They depend on all tokens of a batch. Without them 8-bit weights are trained, and every check passes."""
    for threshold in (6.0, 0.0):
        eight = {"load_in_8bit": True, "llm_int8_threshold": threshold}
        model, options, config = _loaded(tmp_path / "base", **eight), {}, {}
        if given != "model":
            model = str(tmp_path / "base")
            target = options if given == "quantization_config" else config.setdefault("model_init_kwargs", {})
            target["quantization_config"] = BitsAndBytesConfig(**eight)
        arguments = {"train_dataset": para_dataset, "processing_class": tokenizer, "peft_config": _lora()}
        arguments |= options | {"args": make_config(max_steps=12, learning_rate=1e-2, verify=True, **config)}
        if threshold:
            with pytest.raises(ValueError, match="(?s)Got load_in_8bit.*[Ee]xpected.*Fix:.*llm_int8_threshold=0.0"):
                MISOSFTTrainer(model, **arguments)
            continue
        trainer = MISOSFTTrainer(model, **arguments)
        losses = _losses(trainer)
        assert losses[-4:].mean() < losses[:4].mean() - 0.05
        assert {check.status for check in trainer.verification} == {"passed"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_qlora(para_dataset, tokenizer, make_config, tmp_path, avx512bf16, reentrant):
    """Adapters on NF4 weights, by the trainer's `quantization_config`, train as on the same weights dequantized."""
    nf4 = BitsAndBytesConfig(**NF4)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    loaded = {"pretrained_model_name_or_path": tmp_path / "base", "quantization_config": nf4}
    plain, quantized = tiny_model("llama"), AutoModelForCausalLM.from_pretrained(**loaded)
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    arguments = {
        # Evaluations, in which a layer may pack its weights, before and between the steps.
        "args": make_config(
            max_steps=6,
            learning_rate=1e-2,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            eval_strategy="steps",
            eval_steps=2,
            eval_on_start=True,
        ),
        "train_dataset": para_dataset,
        "eval_dataset": para_dataset.select(range(4)),
        "processing_class": tokenizer,
        "peft_config": _lora(),
    }
    reference = MISOSFTTrainer(plain, **arguments)
    for parameter in reference.model.parameters():  # as TRL does on quantized weights, following the QLoRA paper
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    expected = _losses(reference)
    trainer = MISOSFTTrainer(str(tmp_path / "base"), quantization_config=nf4, **arguments)
    assert trainer.model.get_base_model().is_loaded_in_4bit
    torch.testing.assert_close(_losses(trainer), expected, rtol=0, atol=1e-4)
    assert expected[-1] < expected[0]
    if avx512bf16:  # plain inference is in bfloat16 there, and only for inputs in whole blocks of 64
        return
    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(**loaded), str(tmp_path / "adapter"))
    with torch.no_grad():
        logits = trainer.model.eval()(IDS).logits
        # The trainer computes adapters on quantized weights in bfloat16, as the QLoRA paper does.
        torch.testing.assert_close(reloaded.eval()(IDS).logits, logits, rtol=0, atol=1e-2)
