"""Training on FlashAttention-2 kernels, over their emulation: equal to the CPU kernel, chosen as asked, refused before the data."""

import sys
import types

import pytest
import torch
import transformers.integrations.hub_kernels as hub_kernels
import transformers.modeling_flash_attention_utils as flash_utils

from tests.support.flash_emulation import emulated_torch_flash, hub_package
from tests.support.models import tiny_model
from trl_miso import MISOSFTTrainer
from trl_miso.attention import flash
from trl_miso.attention.flash import HUB_REPOSITORY


@pytest.fixture
def on_cpu(monkeypatch):
    """FlashAttention-2 runs on CPU tensors."""
    monkeypatch.setattr(flash, "why_no_flash", lambda device, dtype, head_dim: None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    with emulated_torch_flash():
        yield


@pytest.fixture
def hub(monkeypatch, on_cpu):
    """The Hub's FlashAttention-2, for this package and for transformers."""
    modules = hub_package()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    package = modules["flash_attn2"]
    loaded = []

    def load(repository, *args, **kwargs):
        loaded.append(repository)
        return package

    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", load)
    monkeypatch.setattr(flash, "load_and_register_attn_kernel", load)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    for cached in (flash.why_no_hub_flash, flash._load_hub_flash):
        cached.cache_clear()
    yield loaded
    for cached in (flash.why_no_hub_flash, flash._load_hub_flash):
        cached.cache_clear()


@pytest.fixture
def trained(para_dataset, tokenizer, make_config):
    """A function that trains five steps in bfloat16 and returns the losses and the trainer."""

    def train(base="sdpa", **options):
        model = tiny_model("llama").to(torch.bfloat16)
        model.config._attn_implementation_internal = base
        config = make_config(max_steps=5, logging_steps=1, bf16=True, **options)
        trainer = MISOSFTTrainer(model, config, train_dataset=para_dataset, processing_class=tokenizer)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer

    return train


def test_five_steps_equal_the_cpu_kernel(on_cpu, trained):
    """In bfloat16: both kernels round the same numbers, in another order."""
    expected, _ = trained(attention_kernel="cpu")
    got, _ = trained(attention_kernel="torch_flash")
    assert got == pytest.approx(expected, rel=torch.finfo(torch.bfloat16).eps)
    assert got[0] != got[-1]


def test_the_hubs_kernel_as_base_and_as_kernel(hub, trained, tokenizer):
    expected, _ = trained(attention_kernel="cpu")
    got, trainer = trained(HUB_REPOSITORY)
    assert got == pytest.approx(expected, rel=torch.finfo(torch.bfloat16).eps)
    assert set(hub) == {HUB_REPOSITORY}
    assert trainer.model.config._attn_implementation == HUB_REPOSITORY

    # A batch without contexts runs on the base: the Hub's functions in place of sdpa.
    ids = torch.tensor([tokenizer.encode("The sea is calm and the sky is clear.")])
    model = trainer.model.eval()
    with torch.no_grad():
        with trainer._mixing():
            name = model.config._attn_implementation
            assert name.startswith("miso_hub") and "/" not in name and "flash" not in name
            base = model(input_ids=ids).logits
        model.set_attn_implementation("sdpa")
        sdpa = model(input_ids=ids).logits.float()  # in the trainer's methods accelerate makes outputs float32
    torch.testing.assert_close(base, sdpa, rtol=0, atol=0.05 * float(sdpa.abs().max()))


def test_what_cannot_run_is_refused_before_the_data_are_prepared(
    para_dataset, tokenizer, make_config, monkeypatch, tmp_path
):
    monkeypatch.setattr(MISOSFTTrainer, "_prepare_dataset", lambda *args, **kwargs: pytest.fail("prepared the data"))
    tiny_model("llama").save_pretrained(tmp_path)
    for implementation, kernel, reason in (
        ("flex_attention", "auto", "attn_implementation='flex_attention', expected"),
        ("flash_attention_3", "auto", "attn_implementation='flash_attention_3', expected"),
        ("kernels-community/vllm-flash-attn3", "auto", "vllm-flash-attn3', expected 'sdpa'"),
        (HUB_REPOSITORY, "auto", "hub_flash: FlashAttention-2 needs CUDA tensors"),
        (HUB_REPOSITORY, "cpu", "no FlashAttention-2 kernel"),
        ("sdpa", "torch_flash", "needs CUDA tensors"),
        ("sdpa", "hub_flash", "needs CUDA tensors"),
        (None, "flash_attn", "needs CUDA tensors"),
    ):
        options = {"attn_implementation": implementation} if implementation else {}
        model = tiny_model("llama")
        model.config._attn_implementation_internal = implementation or "sdpa"
        for given in (model, str(tmp_path)):
            config = make_config(attention_kernel=kernel, model_init_kwargs=options if isinstance(given, str) else None)
            with pytest.raises(ValueError, match=f"(?s)Got.*{reason}.*Fix"):
                MISOSFTTrainer(given, config, train_dataset=para_dataset, processing_class=tokenizer)


def test_flash_attention_3_through_torch_takes_the_same_calls(trained, on_cpu, monkeypatch):
    """`activate_flash_attention_impl("FA3")` puts these functions behind the operators that `torch_flash` calls."""
    from torch.nn.attention import _fa3

    from tests.support import flash_emulation

    def fwd(q, k, v, k_new, v_new, qv, out, cu_q, cu_k, cu_k_new, used_q, used_k, max_q, max_k, *rest):
        scale, causal, left, right, chunk, softcap = rest[9:15]
        assert (k_new, v_new, qv, out, cu_k_new, used_q, used_k, chunk) == (None,) * 7 + (0,)
        out, lse = flash_emulation.dense_forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap)
        return out, lse, None, None

    def bwd(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, used_q, used_k, max_q, max_k, scale, causal, left, right,
            softcap, deterministic, margin):  # fmt: skip
        sides = -1 if left is None else left, -1 if right is None else right
        flash_emulation.dense_backward(
            dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, scale, causal, *sides, softcap
        )

    monkeypatch.setattr(_fa3, "_FA3_CUDA_FWD", fwd)
    monkeypatch.setattr(_fa3, "_FA3_CUDA_BWD", bwd)
    monkeypatch.setattr(_fa3, "_fa3_forward_support_error", lambda *args: None)
    monkeypatch.setattr(_fa3, "_fa3_backward_support_error", lambda *args: None)
    aten = types.SimpleNamespace(
        _flash_attention_forward=_fa3._fa3_flash_attention_forward_impl_default,
        _flash_attention_backward=_fa3._fa3_flash_attention_backward_impl,
    )
    expected, _ = trained(attention_kernel="torch_flash")
    monkeypatch.setattr(flash, "_operators", lambda: aten)
    got, _ = trained(attention_kernel="torch_flash")
    assert got == pytest.approx(expected, rel=torch.finfo(torch.bfloat16).eps)
