"""Tiny random models of many architectures, and the rotary embedding used on bare tensors."""

import dataclasses

import torch
import transformers as t
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "attention_dropout": 0.0,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
_MOE = {"num_experts_per_tok": 2}

CONFIGS = {
    "llama": lambda **k: t.LlamaConfig(**_SIZES | k),
    "llama3_rope": lambda **k: t.LlamaConfig(
        **_SIZES
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        }
        | k
    ),
    "yarn": lambda **k: t.LlamaConfig(
        **_SIZES
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        }
        | k
    ),
    "mistral": lambda **k: t.MistralConfig(**_SIZES | {"sliding_window": None} | k),
    "mixtral": lambda **k: t.MixtralConfig(**_SIZES | {"sliding_window": None, "num_local_experts": 4} | _MOE | k),
    "qwen2": lambda **k: t.Qwen2Config(**_SIZES | k),
    "qwen3": lambda **k: t.Qwen3Config(**_SIZES | {"head_dim": 24} | k),
    "gemma2": lambda **k: t.Gemma2Config(
        **_SIZES | {"head_dim": 16, "sliding_window": 128, "layer_types": _SLIDING, "query_pre_attn_scalar": 16} | k
    ),
    "gemma3": lambda **k: t.Gemma3TextConfig(
        **_SIZES | {"head_dim": 16, "sliding_window": 128, "layer_types": _SLIDING, "query_pre_attn_scalar": 16} | k
    ),
    "phi": lambda **k: t.PhiConfig(**_SIZES | {"resid_pdrop": 0.0, "embd_pdrop": 0.0} | k),
    "phi3": lambda **k: t.Phi3Config(**_SIZES | {"resid_pdrop": 0.0, "embd_pdrop": 0.0} | k),
    "glm4": lambda **k: t.Glm4Config(**_SIZES | {"head_dim": 16} | k),
    "cohere2": lambda **k: t.Cohere2Config(**_SIZES | {"sliding_window": 128, "layer_types": _SLIDING} | k),
    "smollm3": lambda **k: t.SmolLM3Config(**_SIZES | {"no_rope_layers": [1, 0, 1]} | k),
    "olmo2": lambda **k: t.Olmo2Config(**_SIZES | k),
    "olmo3": lambda **k: t.Olmo3Config(**_SIZES | {"sliding_window": 128, "layer_types": _SLIDING} | k),
    "ministral3": lambda **k: t.Ministral3Config(
        **_SIZES
        | {
            "head_dim": 16,
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "llama_4_scaling_beta": 0.5,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        }
        | k
    ),
    "gemma4": lambda **k: t.Gemma4TextConfig(
        **_SIZES
        | {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 512,
        }
        | k
    ),
    "granite": lambda **k: t.GraniteConfig(**_SIZES | k),
    "starcoder2": lambda **k: t.Starcoder2Config(
        **_SIZES | {"residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": None} | k
    ),
}


# Where a config has them; the other fields, dropout and heads apart, keep the defaults of the architecture.
_SMALL = _SIZES | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "ffn_dim": 96,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "sliding_window": 128,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 512,
}


_SPECIAL: dict[str, dict] = {
    "gemma4_text": {"global_head_dim": 32},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "zaya": {"num_experts_per_tok": 1},
}


def small_heads(default: t.PreTrainedConfig) -> dict[str, int]:
    """Few and small heads in the proportions of a default config: queries to keys, head sizes to each other and to hidden size."""
    layers = getattr(default, "per_layer_config", None) or [default]
    default = layers[0]
    heads = getattr(default, "num_attention_heads", None)
    if not heads:
        return {}
    keys = getattr(default, "num_key_value_heads", None) or heads
    queries_per_key = heads // keys
    few_keys = min(keys, max(2, 4 // queries_per_key))
    few = few_keys * queries_per_key

    # A head gets 16 dimensions; in latent attention its rotated part gets 8.
    size = getattr(default, "head_dim", None) or default.hidden_size // heads
    unit = getattr(default, "qk_rope_head_dim", 0) / 8 or size / 16
    small = {"num_attention_heads": few, "num_key_value_heads": few_keys, "head_dim": round(size / unit)}
    small["hidden_size"] = few * round(default.hidden_size / heads / unit)
    for name, value in vars(default).items():
        if name.endswith("head_dim") and value:
            small[name] = round(value / unit)
    return small


def shrunk(model_type: str, **overrides) -> t.PreTrainedConfig:
    """A tiny config of any architecture that transformers knows, with a layer of each kind and the head proportions of its default."""
    kind = CONFIG_MAPPING[model_type]
    own = {field.name for field in dataclasses.fields(kind)}
    known = own | {name for name, target in kind.attribute_map.items() if target in own}
    default = kind()
    sizes = {name: size for name, size in (_SMALL | small_heads(default)).items() if name in known}
    noise = ("dropout", "pdrop", "layerdrop", "dropout_prob", "jitter_noise")
    sizes |= {name: 0.0 for name in own if name.endswith(noise)}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    if kinds and "layer_types" in own:
        sizes |= {"layer_types": (kinds * 3)[: max(3, len(kinds))], "num_hidden_layers": max(3, len(kinds))}
    return kind(**sizes | _SPECIAL.get(model_type, {}) | overrides)


def architectures() -> list[str]:
    """Model types of transformers' language models for text, without those that other models are part of, and T5."""
    own = (name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if CONFIG_MAPPING[name].model_type == name)
    return sorted([name for name in own if not CONFIG_MAPPING[name].sub_configs] + ["t5"])


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **overrides) -> t.PreTrainedModel:
    """A model of `CONFIGS`, or of any model type of transformers."""
    return random_model(CONFIGS[name](**overrides) if name in CONFIGS else shrunk(name, **overrides), dtype)


def random_model(config: t.PreTrainedConfig, dtype: torch.dtype = torch.float32) -> t.PreTrainedModel:
    torch.manual_seed(0)
    kind = t.AutoModelForSeq2SeqLM if config.model_type == "t5" else t.AutoModelForCausalLM
    model = kind.from_config(config, dtype=dtype)
    for p in model.parameters():  # larger than the usual initialisation, so that attention is not uniform
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.15)
    return model.train()


def rotation(head_dim: int, base: float = 10.0):
    """Rotary embedding in float64 on (N, heads, D) by (N,) positions."""
    frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def turn(x_NHD: torch.Tensor, offset_N: torch.Tensor, limit: int, inverse: bool = False) -> torch.Tensor:
        assert limit > offset_N.max() and offset_N.min() >= 0
        angle = (-offset_N if inverse else offset_N)[:, None].double() * frequencies
        cos, sin = (torch.cat([f(angle)] * 2, dim=-1)[:, None] for f in (torch.cos, torch.sin))
        half = head_dim // 2
        turned = torch.cat([-x_NHD[..., half:], x_NHD[..., :half]], dim=-1)
        return (x_NHD.double() * cos + turned.double() * sin).to(x_NHD.dtype)

    return turn
