"""What MISO cannot train is refused before training, with what was got, what was expected and how to fix it."""

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from datasets import Dataset

from tests.support.models import CONFIGS, tiny_model
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.attention import register_miso_attention, transformers_attention
from trl_miso.attention.rotation import rotation_of
from trl_miso.attention.support import check_config, prepare_model

NAME = register_miso_attention("sdpa", "auto")


def _refused(match, error=ValueError):
    return pytest.raises(error, match=f"(?s)(?=Got.*[Ee]xpected.*Fix).*{match}")


@pytest.fixture
def train(para_dataset, tokenizer, make_config):
    """Makes a trainer on the para rows, with the given arguments."""

    def make(model=None, dataset=None, peft_config=None, data_collator=None, **options):
        return MISOSFTTrainer(
            model if model is not None else tiny_model("llama"),
            make_config(**options),
            train_dataset=dataset if dataset is not None else para_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            data_collator=data_collator,
        )

    return make


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (lambda: CONFIGS["llama"](attention_dropout=0.1), "attention_dropout=0.1"),
        (lambda: t.Qwen3NextConfig(num_hidden_layers=4), "linear_attention"),
        (lambda: t.T5Config(), "encoder-decoder"),
        (lambda: CONFIGS["gemma3"](use_bidirectional_attention=True), "bidirectional"),
    ],
)
def test_model_configs_that_cannot_be_trained(config, match):
    with _refused(match):
        check_config(config())


def _small(config_class, **sizes):
    base = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return t.AutoModelForCausalLM.from_config(config_class(**base | sizes))


def _falcon_h1():
    """Attention and a state-space mixer side by side in every layer, so that all layers receive the metadata."""
    sizes = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
    return _small(t.FalconH1Config, intermediate_size=32, num_key_value_heads=2, head_dim=16, **sizes)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: _small(t.StableLmConfig, intermediate_size=32, num_key_value_heads=2),
            "StableLmForCausalLM.*0 of 2 layers",
        ),
        (
            lambda: _small(t.NemotronConfig, intermediate_size=32, num_key_value_heads=2),
            "NemotronForCausalLM.*0 of 2 layers",
        ),
        (lambda: _small(t.BloomConfig), "BloomForCausalLM"),
        (
            lambda: _small(
                t.GptOssConfig, intermediate_size=32, num_key_value_heads=2, head_dim=16, num_local_experts=4
            ),
            "GptOssForCausalLM.*attention sinks",
        ),
        (
            lambda: _small(t.DogeConfig, intermediate_size=32, num_key_value_heads=2),
            "DogeForCausalLM.*mask in a way of its own",
        ),
        (_falcon_h1, "falcon_h1.*hybrid"),
    ],
    ids=["stablelm", "nemotron", "bloom", "gpt_oss", "doge", "falcon_h1"],
)
def test_architectures(make, match):
    with _refused(match):
        prepare_model(make(), NAME, None)


def test_absolute_positions_need_after_longest(train, tokenizer):
    def gpt2():
        return _small(t.GPT2Config, vocab_size=512, n_positions=1024, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)

    with _refused("gpt2.*more than position differences.*output_positions='after_longest'"):
        train(gpt2())
    trainer = train(gpt2(), output_positions="after_longest")
    trainer.train()
    train(gpt2(), context_mode="single").train()


@pytest.mark.parametrize("name", ["hunyuan_v1_dense", "beam"])
def test_attention_that_is_not_relative(train, name):
    """Norms after the rotation, though untrained, and queries scaled by their position show in the attention scores."""
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with _refused("more than position differences.*output_positions='after_longest'"):
        train(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    train(model, output_positions="after_longest", max_length=128).verify(3)


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_3"])
def test_other_implementations(train, implementation):
    model = tiny_model("llama")
    model.config._attn_implementation_internal = implementation
    with _refused(f"attn_implementation='{implementation}'"):
        train(model)


def test_flash_attention_2_needs_flash_kernels(train):
    """On a CPU it is refused, not replaced."""
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with _refused("flash_attention_2.*needs CUDA tensors"):
        train(model)


def test_flash_attention_2_without_its_package(train):
    with _refused(r"flash_attention_2.*pip install flash-attn.*attention_kernel='torch_flash'", ImportError):
        train("some/model", model_init_kwargs={"attn_implementation": "flash_attention_2"})


def test_kernel_without_its_package(train):
    with _refused("attention_kernel='flash_attn'.*needs CUDA tensors"):
        train(attention_kernel="flash_attn")


def test_data_collator(train):
    with _refused("data_collator"):
        train(data_collator=t.DefaultDataCollator())


def test_prompt_learning(train):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with _refused("prompt-learning"):
        train(peft_config=config)
    with _refused("prompt-learning"):
        train(peft.get_peft_model(tiny_model("llama"), config))


def test_truncation_mode(train):
    with _refused("truncation_mode='keep_end'"), pytest.warns(FutureWarning):
        train(truncation_mode="keep_end")


def test_packing_without_a_length(train):
    with _refused("packing=True with max_length=None"):
        train(packing=True, max_length=None)


@pytest.mark.parametrize("options", [{"context_mode": "succ"}, {"output_positions": "after_longest"}])
def test_window_that_contexts_cannot_honour(train, options):
    with _refused("sliding window of 16.*max_length <= 16"):
        train(tiny_model("mistral", sliding_window=16), **options)
    train(tiny_model("mistral", sliding_window=2000), **options).train()


def test_binding_window_with_para_trains(train):
    train(tiny_model("mistral", sliding_window=16)).train()


@pytest.mark.parametrize("name", ["granitemoe", "granitemoeshared", "phimoe"])
def test_balancing_loss_that_trl_cannot_compute(train, name):
    with _refused("router_aux_loss_coef=0.001.*num_experts.*router_aux_loss_coef=0"):
        train(tiny_model(name))
    with _refused("router_aux_loss_coef=0.1"):
        train(tiny_model(name), router_aux_loss_coef=0.1)
    train(tiny_model(name), router_aux_loss_coef=0.0, max_length=64).train()


def test_balancing_loss_counts_shared_prefixes_once(train):
    """The load-balancing loss is the model's own on the tokens of the batch: sharing prefixes changes it, and nothing else."""
    losses = {}
    for share in (True, False):
        trainer = train(tiny_model("mixtral"), share_prefixes=share)
        batch = next(iter(trainer.get_train_dataloader()))
        labels = batch["labels"]
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, dict(batch)).item()
            out = trainer.model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
        own = torch.nn.functional.cross_entropy(out.logits[0, :-1], labels[0, 1:], ignore_index=-100).item()
        assert loss == pytest.approx(own + 0.001 * out.aux_loss.item(), rel=1e-5)
        losses[share] = own, out.aux_loss.item(), labels.shape[1]
    (shared, shared_aux, shared_tokens), (copied, copied_aux, copied_tokens) = losses[True], losses[False]
    assert shared == pytest.approx(copied, rel=1e-5)
    assert shared_tokens < copied_tokens and abs(shared_aux - copied_aux) > 1e-4


def test_gradient_checkpointing_that_the_model_does_not_support(train):
    with _refused("gradient_checkpointing=True and JetMoeForCausalLM"):
        train(tiny_model("jetmoe"), gradient_checkpointing=True)
    train(tiny_model("jetmoe"), gradient_checkpointing=False).train()


@pytest.mark.parametrize("parallelism", ["cp_enabled", "sp_enabled"])
def test_sequence_split_across_ranks(train, parallelism, monkeypatch):
    trainer = train()
    enabled = SimpleNamespace(**{"cp_enabled": False, "sp_enabled": False, parallelism: True})
    monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", enabled)
    with _refused("context or sequence parallelism"):
        trainer._install(trainer.args)


def test_dispatch_batches_is_forced_off(train, caplog):
    trainer = train(accelerator_config={"dispatch_batches": True})
    assert trainer.accelerator.dataloader_config.dispatch_batches is False
    assert "dispatch_batches" in caplog.text


def test_data_parallel(train, monkeypatch):
    """Several GPUs in one process: TRL refuses them, since the replicas would share one forward."""
    monkeypatch.setattr(MISOSFTConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="nn.DataParallel"):
        train()


def test_metadata_is_checked_on_the_first_batch(train):
    """A model whose attention is switched back within training would ignore the contexts. The first step refuses it."""

    class SwitchBack(t.TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            model.set_attn_implementation("sdpa")

    trainer = train()
    trainer.add_callback(SwitchBack())
    with _refused("0 of 3 layers"):
        trainer.train()


def test_neftune_and_dropout_turn_sharing_off(train, caplog):
    peft = pytest.importorskip("peft")
    assert train().data_collator.share_prefixes
    for options in (
        {"neftune_noise_alpha": 1.0},
        {"peft_config": peft.LoraConfig(lora_dropout=0.1, target_modules=["q_proj"])},
    ):
        caplog.clear()
        assert not train(**options).data_collator.share_prefixes
        assert caplog.text.count("share_prefixes is turned off") == 1
        is_lora = "peft_config" in options
        assert (
            "dropout (lora_dropout=0.1) makes equal tokens unequal; lora_dropout=0 shares" in caplog.text
        ) == is_lora


def test_noise_of_an_adapter_turns_sharing_off(train, caplog):
    """PVeRA draws noise for each token, without a module for dropout."""
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "PveraConfig"):
        pytest.skip("this PEFT has no PveraConfig")
    assert not train(peft_config=peft.PveraConfig(target_modules=["q_proj"])).data_collator.share_prefixes
    assert "PVeRA's noise makes equal tokens unequal" in caplog.text


def test_offloading_activations_needs_an_accelerator(train):
    with _refused("activation_offloading=True on a CPU"):
        train(activation_offloading=True)


def test_long_rope_turns_sharing_off(train, caplog):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256, **factors}
    rope = {"rope_parameters": rope, "original_max_position_embeddings": 256}
    trainer = train(tiny_model("phi3", **rope))
    assert not trainer.data_collator.share_prefixes and "longrope positions change beyond 256" in caplog.text
    assert train(tiny_model("phi3", **rope), max_length=256).data_collator.share_prefixes


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_queries_and_keys_are_both_compared(norm, monkeypatch):
    """Where queries or keys are scaled per dimension after the rotation, rotating them again does not give a later position."""
    model = tiny_model("llama")
    module = sys.modules[type(model).__module__]
    apply = module.apply_rotary_pos_emb
    scale = torch.linspace(0.5, 1.5, model.config.head_dim)

    def scaled(q, k, *args, **kwargs):
        q, k = apply(q, k, *args, **kwargs)
        return (q * scale, k) if norm == "q_norm" else (q, k * scale)

    assert prepare_model(model, NAME, None).shares
    monkeypatch.setattr(module, "apply_rotary_pos_emb", scaled)
    assert not prepare_model(model, NAME, None).shares


@pytest.mark.parametrize("name", ["llama", "deepseek_v2", "deepseek_v3", "minicpm3", "youtu", "axk1", "glm4_moe_lite"])
def test_models_without_weights_are_checked_without_a_forward(name):
    """On the meta device, as under ZeRO-3, listed model families share prefixes with the rotation that a forward would find. Others
    do not."""
    with torch.device("meta"):
        model = t.AutoModelForCausalLM.from_config(CONFIGS["smollm3"]())
    assert not prepare_model(model, NAME, None).shares

    with torch.device("meta"):
        model = t.AutoModelForCausalLM.from_config(tiny_model(name).config)
    for rotary in (m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")):
        rotary.__init__(model.config)  # as from_pretrained does
        rotary.to("cpu")
    support = prepare_model(model, NAME, None)
    assert support.shares and support.layers == 3
    weighty = tiny_model(name)
    prepare_model(weighty, NAME, None)
    expected = [rotation_of(module) for module in weighty.modules() if rotation_of(module)]
    got = [rotation_of(module) for module in model.modules() if rotation_of(module)]
    assert [(r.apply, r.start, r.layer_type) for r in got] == [(r.apply, r.start, r.layer_type) for r in expected]
    assert len(got) == 3


@pytest.mark.parametrize(
    ("dataset", "options", "match"),
    [
        (Dataset.from_dict({"question": ["a"]}), {}, "columns.*question"),
        (Dataset.from_dict({"text": ["a b c"]}), {"context_mode": "para"}, "plain text"),
        (
            Dataset.from_dict({"prompt": ["a b"], "completion": [" c"]}),
            {"context_mode": "para"},
            "constraints or a contexts column",
        ),
    ],
)
def test_rows_without_a_format(train, dataset, options, match):
    with _refused(match):
        train(dataset=dataset, **options)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_without_metadata_the_base_implementation_runs(base, name):
    """Logits of padded and packed batches, and generation, equal those of the loaded model bit for bit."""
    overrides = {"sliding_window": 6} if name == "mistral" else {}
    model = tiny_model(name, **overrides).eval()
    model.set_attn_implementation(base)
    ids = torch.randint(3, 500, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]

    def run():
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        return (
            model(ids, attention_mask=mask).logits,
            model(ids[:1], position_ids=positions, use_cache=False).logits,
            generated,
        )

    expected = run()
    model.set_attn_implementation(register_miso_attention(base, "auto"))
    for a, b in zip(run(), expected, strict=True):
        assert torch.equal(a, b)


def test_no_mask_is_made_for_miso_batches(train, monkeypatch):
    """For batches with metadata the base implementation's T x T mask is never built."""
    masks = []
    monkeypatch.setattr(transformers_attention.LazyMask, "get", lambda self: masks.append(self))
    train().train()
    assert not masks


def test_registered_names_avoid_those_of_transformers():
    for base in ("sdpa", "eager", "flash_attention_2"):
        for kernel in ("auto", "flash_attn", "torch_flash", "cpu", "reference"):
            name = register_miso_attention(base, kernel)
            assert not any(word in name for word in ("flash", "sdpa", "flex_attention", "paged|", "/"))
            assert transformers_attention.base_implementation(name) == base


def test_loss_on_contexts_is_refused(train):
    with _refused("completion_only_loss=False.*context_mode='single'"):
        train(completion_only_loss=False)


def test_dataset_with_a_transform(train, para_dataset):
    with _refused("with_transform"):
        train(dataset=para_dataset.with_transform(lambda batch: batch))


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
@pytest.mark.parametrize("mode", ["para", "single"])
def test_formatted_datasets_are_read_as_stored(train, para_dataset, kind, mode):
    expected = train(context_mode=mode).train_dataset["input_ids"][:]
    got = train(dataset=para_dataset.with_format(kind), context_mode=mode).train_dataset
    assert got.with_format(None)["input_ids"][:] == expected


def test_prepared_rows_are_not_prepared_again(train):
    """Rows that a trainer prepared train again, without their text columns."""
    prepared = train().train_dataset
    again = train(dataset=prepared)
    assert again.train_dataset["miso_layout"][:] == prepared["miso_layout"][:]
    again.train()
    assert again.state.log_history[0]["multi_context_share"] > 0


def test_queries_scaled_by_position_are_not_relative(train):
    """Ministral 3 scales queries beyond its original length, where neither rotation nor right-alignment is exact."""
    with _refused("ministral3.*scaled by their position beyond 64 tokens.*after_longest"):
        train(tiny_model("ministral3"))
    assert train(tiny_model("ministral3"), output_positions="after_longest").data_collator.share_prefixes
    assert prepare_model(tiny_model("ministral3"), NAME, 64).shares


def test_vanilla_weighting_needs_windows_that_do_not_bind(train):
    with _refused("sliding window of 300.*weighting 'vanilla'"):
        train(tiny_model("mistral", sliding_window=300), context_weighting="vanilla")


def test_rows_packed_by_trl_keep_their_boundaries(train):
    rows = {"input_ids": [list(range(5, 29))] * 4, "labels": [list(range(5, 29))] * 4, "seq_lengths": [[10, 14]] * 4}
    trainer = train(dataset=Dataset.from_dict(rows))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["miso_cu_seqlens_q"].tolist() == [0, 10, 24]
    with _refused("seq_lengths"):
        train(dataset=Dataset.from_dict(rows), max_length=20)


@pytest.mark.parametrize(
    ("row", "options", "match"),
    [
        ({"input_ids": [5, 6, 7]}, {"context_mode": "succ"}, "context_mode='succ'"),
        (
            {"contexts": ["a b", "c b"], "context_weights": [1.0, 2.0]},
            {"context_weighting": "fid"},
            "context_weighting",
        ),
        (
            {"contexts": ["a b", "c b"], "context_weights": [1.0, 2.0]},
            {"full_context_weight": 0.5},
            "full_context_weight",
        ),
        ({"prompt": "a b", "constraints": ["c"], "context_weights": [1.0, 2.0]}, {}, "context_weights"),
        ({"contexts": ["a b", "c b"]}, {"include_full": False}, "include_full"),
        ({"prompt": "a b"}, {"full_context_weight": 0.5}, "full_context_weight"),
        ({"prompt": "a b"}, {"include_bare": False}, "include_bare"),
        ({"prompt": "a b"}, {"output_positions": "after_longest"}, "output_positions"),
    ],
)
def test_settings_without_effect(train, row, options, match):
    row = row if "input_ids" in row else row | {"completion": " c"}
    with _refused(match):
        train(dataset=Dataset.from_list([row]), **options)


def test_prepared_rows_are_packed_but_never_cut(train):
    prepared = train().train_dataset
    packed = train(dataset=prepared, packing=True, max_length=700).train_dataset
    assert len(packed) < len(prepared)
    assert sum(map(len, packed["input_ids"])) == sum(map(len, prepared["input_ids"]))
    with _refused("row . has an example of .* positions, expected at most max_length=40"):
        train(dataset=prepared, max_length=40)


def test_bins_are_measured_without_sharing_where_dropout_forbids_it(train):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(lora_dropout=0.1, target_modules=["q_proj"])
    for model, options in (
        (tiny_model("llama"), {"peft_config": config}),
        (peft.get_peft_model(tiny_model("llama"), config), {}),
        (tiny_model("phi3", resid_pdrop=0.1), {}),
    ):
        trainer = train(model, packing=True, max_length=3000, **options)
        assert not trainer.data_collator.share_prefixes
        assert max(trainer.data_collator([row])["input_ids"].shape[1] for row in trainer.train_dataset) <= 3000


def test_fsdp_does_not_copy_the_probe():
    """FSDP rebuilds dataclasses and dicts among the inputs; layers would record into a copy."""
    from torch.distributed.utils import _apply_to_tensors

    probe = transformers_attention.Probe()
    assert _apply_to_tensors(lambda x: x, {"miso_probe": probe})["miso_probe"] is probe


def test_config_overrides_reach_the_check(train, tokenizer, tmp_path):
    tiny_model("llama", attention_dropout=0.1).save_pretrained(tmp_path)
    with _refused("attention_dropout=0.1"):
        train(str(tmp_path))
    train(str(tmp_path), model_init_kwargs={"attention_dropout": 0.0}).train()


def test_arguments_of_another_class(train, make_config):
    from dataclasses import dataclass

    from trl import SFTConfig

    @dataclass
    class Mine(SFTConfig):
        extra: int = 1

    with _refused("Mine with .'extra'"):
        MISOSFTTrainer(tiny_model("llama"), make_config(Mine))


@pytest.mark.parametrize("layer", [0, 2])
def test_tokens_that_interact_outside_of_attention(layer):
    """A token shift in one layer's MLP, as in recurrent and convolutional layers, mixes packed contexts."""
    model = tiny_model("llama")
    mlp = model.model.layers[layer].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x + torch.nn.functional.pad(x, (0, 0, 1, -1)))
    with _refused("LlamaForCausalLM, in which tokens see each other outside of attention"):
        prepare_model(model, NAME, None)
