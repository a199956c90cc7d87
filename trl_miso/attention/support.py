"""Check that a model can be trained with MISO, and find how each layer rotates queries and keys, before training starts."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from trl_miso.attention.rotation import candidate_rotations, no_rotation, set_rotation
from trl_miso.attention.state import in_eval_mode
from trl_miso.attention.transformers_attention import Probe, set_implementation

_TRAINED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_OTHER_DROPOUTS = (
    *("resid_pdrop", "embd_pdrop", "residual_dropout", "embedding_dropout"),
    *("hidden_dropout", "hidden_dropout_prob", "dropout", "activation_dropout"),
    *("router_jitter_noise", "input_jitter_noise"),
)
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
# Families in which every layer rotates its queries, by their source code. Used only where no forward can run.
_ROTATES_EVERY_LAYER = [
    "llama",
    "mistral",
    "ministral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "phi",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "olmo",
    "olmo2",
    "granite",
    "granitemoe",
    "starcoder2",
    "glm4",
    "glm4_moe_lite",
    "seed_oss",
    "deepseek_v2",
    "deepseek_v3",
    "minicpm3",
    "youtu",
    "axk1",
]


@dataclass(frozen=True)
class ModelSupport:
    """Properties of a model that decide how its batches are laid out.

    Args:
        shares: Keys can be turned by further positions, so contexts may share prefixes. If not, `reason` says why.
        relative: Attention depends on position differences only, so contexts may be right-aligned.
        window: Smallest sliding window that a row can exceed, in tokens; 0 for none.
        layers: Number of attention layers, all of which must receive the metadata.
    """

    shares: bool
    relative: bool
    window: int
    layers: int
    reason: str = ""


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapters_of(model: Any, peft_config: Any = None) -> list[Any]:
    """The PEFT configs of a model, and the one that will be applied to it."""
    return [config for config in [peft_config, *getattr(model, "peft_config", {}).values()] if config is not None]


def check_adapters(model: Any, peft_config: Any = None) -> None:
    """Raise ValueError for adapters, of the model or of `peft_config`, that add tokens, or in which the rows of a batch see each other."""
    configs = adapters_of(model, peft_config)
    if any(getattr(config, "is_adaption_prompt", False) for config in configs):
        raise ValueError(
            "Got PEFT's AdaptionPrompt, whose layers attend to tokens of their own beside the mixture, and which hides the model from "
            "SFTTrainer's loss; expected adapters in the weights. Fix: use LoRA or another adapter."
        )
    if any(getattr(config, "is_prompt_learning", False) for config in configs):
        raise ValueError(
            "Got a PEFT prompt-learning method, whose virtual tokens shift every index of the segments; expected adapters in the "
            "weights. Fix: use LoRA or another adapter."
        )
    # The checks before the first step would find both, after the rows are prepared and the weights are loaded.
    if any(getattr(config, "alora_invocation_tokens", None) for config in configs):
        raise ValueError(
            "Got PEFT's aLoRA (alora_invocation_tokens), which acts from the last invocation in a batch on: in packed rows, on the last row "
            "alone. Expected adapters that treat each token alike. Fix: use LoRA without alora_invocation_tokens."
        )
    if any(config.peft_type == "LILY" for config in configs):
        raise ValueError(
            "Got PEFT's Lily, which averages the routing of its experts over all tokens of a batch: contexts and rows would change each "
            "other's loss. Expected adapters that treat each token alike. Fix: use LoRA or another adapter."
        )


def check_relative(model_type: str, support: ModelSupport) -> None:
    """Raise ValueError for output_positions='successive' if the output cannot follow contexts of different lengths."""
    if not support.relative:
        raise ValueError(
            f"Got a {model_type} model with output_positions='successive', whose output cannot follow contexts of different "
            f"lengths: {support.reason}. Expected attention that depends on position differences only. Fix: set "
            "output_positions='after_longest'."
        )


def check_config(config: PreTrainedConfig) -> None:
    """Raise ValueError if the config alone shows that the model is not supported."""
    text = config.get_text_config()
    for name in _DROPOUTS:
        if getattr(text, name, 0):
            _refuse(text, f"{name}={getattr(text, name)}", "attention without dropout", f"set config.{name} = 0")
    others = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        _refuse(
            text, f"layers of type {sorted(others)}", "only full and sliding attention", "use a pure attention model"
        )
    if getattr(config, "is_encoder_decoder", False):
        _refuse(text, "an encoder-decoder", "a decoder-only causal language model", "use one")
    if getattr(text, "use_bidirectional_attention", None) or getattr(text, "is_causal", True) is False:
        _refuse(text, "bidirectional attention", "causal attention", "use a causal language model")
    if getattr(text, "alibi", False):
        _refuse(text, "ALiBi position biases", "rotary positions", "use a model with rotary positions")


def prepare_model(model: PreTrainedModel, name: str, max_length: int | None) -> ModelSupport:
    """Switch the model to a registered attention, check that every layer takes part, and set the rotation of each layer.

    Forwards over a few tokens decide. Under ZeRO-3 or on the meta device, where weights are not available, only the checks
    that need no weights run, and the trainer's first step does the rest.

    Args:
        name: From `register_miso_attention`.
        max_length: Tokens of the longest row; None for any length.

    Raises:
        ValueError: With the model's name and the reason, if the model cannot be trained with MISO.
    """
    return limit_to_length(model, inspect_model(model, name, max_length), max_length)


def inspect_model(model: PreTrainedModel, name: str, max_length: int | None) -> ModelSupport:
    """`prepare_model` without the limits that depend on row length (`limit_to_length`): the window stays 0."""
    check_config(model.config)
    set_implementation(model, name)
    config = model.config.get_text_config()
    if all(not p.is_meta and not hasattr(p, "ds_id") for p in model.parameters()):
        return _probe(model, config, max_length)
    if any(isinstance(m, nn.Conv1d | nn.RNNBase) or "Mamba" in type(m).__name__ for m in model.modules()):
        _refuse(config, "recurrent or convolutional layers", "a pure attention model", "use one")
    modules = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")]
    shares = config.model_type in _ROTATES_EVERY_LAYER and len(modules) == config.num_hidden_layers
    for module in modules if shares else ():
        composing = (r for r in candidate_rotations(model, module) if r.composes(head_dim(config)))
        rotation = next(composing, None)
        set_rotation(module, rotation)
        shares = shares and rotation is not None
    reason = "" if shares else f"how {config.model_type} rotates queries and keys cannot be checked without its weights"
    return ModelSupport(shares, True, 0, config.num_hidden_layers, reason)


def limit_to_length(model: PreTrainedModel, support: ModelSupport, max_length: int | None) -> ModelSupport:
    """Restrict the result of `inspect_model` to what rows of at most `max_length` tokens (None: any) allow.

    Adds the window and what a short forward cannot show. Where the rotation depends on the length of the row, keys cannot be
    turned by an offset afterwards, so nothing is shared. Where queries are scaled by their position, attention is not relative.
    """
    config = model.config.get_text_config()
    support = replace(support, window=_window(model, config, max_length))
    for rope in _rope_parameters(config):
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if (max_length or math.inf) <= original:
            continue
        if rope.get("llama_4_scaling_beta") or getattr(config, "attn_temperature_tuning", None):
            reason = f"queries are scaled by their position beyond {original} tokens (max_length={max_length})"
            return replace(support, shares=False, relative=False, reason=reason)
        if rope.get("rope_type") in ("dynamic", "longrope"):
            reason = f"{rope['rope_type']} positions change beyond {original} tokens (max_length={max_length})"
            return replace(support, shares=False, reason=reason)
    return support


def check_probe(probe: Probe, layers: int, model: nn.Module) -> None:
    """Raise ValueError unless every attention layer received the metadata and computes plain softmax attention."""
    model_type = type(model).__name__
    if len(probe.heads) != layers:
        raise ValueError(
            f"Got {model_type}, in which {len(probe.heads)} of {layers} layers pass keyword arguments on to attention: the "
            "others would ignore the contexts. Expected all of them. Fix: use a supported architecture (docs/kernels.md lists them)."
        )
    for argument, what in {"sinks": "attention sinks", "position_bias": "a position bias"}.items():
        if argument in probe.arguments:
            raise ValueError(
                f"Got {model_type}, whose attention has {what}, which the mixture does not support. Expected plain softmax "
                "attention. Fix: use a supported architecture (docs/kernels.md lists them)."
            )


def why_not_share(
    model: nn.Module | None, config: PreTrainedConfig, neftune_noise_alpha: float | None, adapter_dropout: float = 0.0
) -> str:
    """Why equal tokens would not have equal hidden states in training; '' if they would. Without a model only the config is examined."""
    if neftune_noise_alpha:
        return f"NEFTune noise (neftune_noise_alpha={neftune_noise_alpha}) makes equal tokens unequal"
    if any(adapter.peft_type == "PVERA" for adapter in adapters_of(model)):
        return "PVeRA's noise makes equal tokens unequal"
    text = config.get_text_config()
    rates = {name: rate for name in _OTHER_DROPOUTS if isinstance(rate := getattr(text, name, None), float)}
    rates["lora_dropout"] = adapter_dropout
    for name, module in model.named_modules() if model is not None else ():
        if isinstance(module, nn.Dropout):
            own = "lora_dropout" if "lora_dropout" in name.split(".") else "dropout"
            rates[own] = max(rates.get(own, 0.0), module.p)
    name = max(rates, key=rates.__getitem__)
    if not rates[name]:
        return ""
    fix = "; lora_dropout=0 shares them" if name == "lora_dropout" else ""
    return f"dropout ({name}={rates[name]}) makes equal tokens unequal{fix}"


def _probe(model: PreTrainedModel, config: PreTrainedConfig, max_length: int | None) -> ModelSupport:
    """Compare each layer's queries and keys at two positions: equal, turned by the model's rotation, or neither."""
    distance = _probe_distance(config, max_length)
    with _uneven_norms(model):
        (near, logits), (far, _) = _run(model, 0), _run(model, distance)
        check_probe(near, config.num_hidden_layers, model)
        _check_isolation(model, near, logits)
    relative, shares = True, True
    for module, near_heads in near.heads.items():
        far_heads = far.heads[module]
        assert near_heads is not None and far_heads is not None
        tolerance = _tolerance(near_heads.dtype)
        x, y = near_heads[0].transpose(0, 1), far_heads[0].transpose(0, 1)
        if _max_relative_distance(x, y) < tolerance:
            set_rotation(module, no_rotation)  # a layer without positions
            continue
        offset = torch.full((x.shape[0],), distance, device=x.device)
        fitting = None
        for rotation in candidate_rotations(model, module):
            if not rotation.composes(x.shape[-1]):
                continue
            if _max_relative_distance(rotation(x, offset, distance + 1), y) < tolerance:
                fitting = rotation
                break
        set_rotation(module, fitting)
        if fitting is None:
            shares = False
            relative = relative and _same_scores(x, y, near.queries[module], tolerance)
    reason = ""
    if not relative:
        reason = "its attention depends on more than position differences"
    elif not shares:
        reason = "its keys cannot be rotated after the fact"
    return ModelSupport(shares, relative, 0, config.num_hidden_layers, reason)


def _probe_distance(config: PreTrainedConfig, max_length: int | None) -> int:
    """Distance of two positions: far enough to show any dependence on the position, near enough for one and the same rotation."""
    lengths = [rope.get("original_max_position_embeddings") for rope in _rope_parameters(config)]
    lengths += [max_length, getattr(config, "max_position_embeddings", None), 2048]
    return max(5, min(length for length in lengths if length) - 8)


@contextmanager
def _uneven_norms(model: nn.Module) -> Iterator[None]:
    """Make vectors of equal weights (untrained norms) uneven for a while: a norm of equal weights commutes with the rotation,
    which would hide a norm that comes after the rotation."""
    vectors = (p for p in model.parameters() if p.dim() == 1 and p.dtype in _TRAINED)
    even = [(p, p.data) for p in vectors if bool((p == p[0]).all())]
    for p, data in even:
        p.data = data * torch.linspace(0.5, 1.5, len(data), device=data.device).to(data.dtype)
    try:
        yield
    finally:
        for p, data in even:
            p.data = data


def _same_scores(x_NHD: torch.Tensor, y_NHD: torch.Tensor, queries: int, tolerance: float) -> bool:
    """Whether queries (the first heads) and keys give the same scores at both positions, so that attention is relative."""

    def scores(heads_NHD: torch.Tensor) -> torch.Tensor:
        heads_NHD = heads_NHD.float()
        heads_HND = (heads_NHD / heads_NHD.norm(dim=-1, keepdim=True).clamp(min=1e-9)).transpose(0, 1)
        q, k = heads_HND[:queries], heads_HND[queries:]
        return q @ k.repeat_interleave(len(q) // len(k), dim=0).transpose(1, 2)

    # Directions are compared without lengths, so compare lengths too: queries may be scaled by their position.
    ratio = (x_NHD.norm(dim=-1) / y_NHD.norm(dim=-1).clamp(min=1e-9)).float()
    same_lengths = float((ratio - 1).abs().max()) < tolerance
    return same_lengths and float((scores(x_NHD) - scores(y_NHD)).abs().max()) < tolerance


def _check_isolation(model: PreTrainedModel, probe: Probe, logits: torch.Tensor) -> None:
    """Raise ValueError if tokens see each other without attention: recurrent and convolutional layers would join packed contexts."""
    # Another first token may change nothing in the tokens after it.
    changed, changed_logits = _run(model, 0, first=1)
    pairs = [(logits, changed_logits)]
    for module, heads in probe.heads.items():
        changed_heads = changed.heads[module]
        assert heads is not None and changed_heads is not None
        pairs.append((heads[0].transpose(0, 1), changed_heads[0].transpose(0, 1)))
    if any(_max_relative_distance(x[1:], y[1:]) > _tolerance(x.dtype) for x, y in pairs):
        raise ValueError(
            f"Got {type(model).__name__}, in which tokens see each other outside of attention (recurrent or convolutional layers). "
            "Expected a pure attention model. Fix: use a supported architecture (docs/kernels.md lists them)."
        )


def _run(model: PreTrainedModel, start: int, first: int = 3) -> tuple[Probe, torch.Tensor]:
    """Run a forward without attention over 8 tokens from position `start`; return the probe and the logits (8, vocabulary)."""
    probe = Probe(skip_attention=True)
    device = model.get_input_embeddings().weight.device
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = (torch.tensor([first, *range(4, 11)], device=device) % vocab)[None]
    positions = torch.arange(start, start + ids.shape[1], device=device)[None]
    try:
        with torch.no_grad(), in_eval_mode(model):
            logits = model(input_ids=ids, position_ids=positions, use_cache=False, miso_probe=probe).logits[0]
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"Got {type(model).__name__}, which fails on keyword arguments for attention or uses its mask in a way of its own "
            f"({error}). Expected a model that passes them on. Fix: use a supported architecture (docs/kernels.md lists them)."
        ) from error
    return probe, logits


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2


def _max_relative_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest distance of two rows, relative to the row of b."""
    return float(((a - b).float().norm(dim=-1) / b.float().norm(dim=-1).clamp(min=1e-9)).max())


def _rope_parameters(config: PreTrainedConfig) -> list[dict]:
    """Rotary parameters of the config: one dict, or one per layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _window(model: PreTrainedModel, config: PreTrainedConfig, max_length: int | None) -> int:
    """Smallest sliding window of a layer, in tokens; 0 if rows cannot be longer."""
    windows = [getattr(m, "sliding_window", None) for m in model.modules() if hasattr(m, "layer_idx")]
    layer_types = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", True) and (not layer_types or "sliding_attention" in layer_types):
        windows.append(getattr(config, "sliding_window", None))
    smallest = min((w for w in windows if isinstance(w, int) and w > 0), default=0)
    return smallest if max_length is None or smallest < max_length else 0


def head_dim(config: PreTrainedConfig) -> int:
    """Size of the largest head as kernels see it, of queries and keys or of values; layers may differ."""
    sizes = []
    for layer in getattr(config, "per_layer_config", None) or [config]:
        # In latent attention `head_dim` is the size of the part that is rotated.
        query = getattr(layer, "qk_head_dim", None) or getattr(layer, "head_dim", None)
        sizes.append(query or layer.hidden_size // layer.num_attention_heads)
        sizes.append(getattr(layer, "v_head_dim", None) or 0)
    return max(sizes)


def _refuse(config: PreTrainedConfig, got: str, expected: str, fix: str) -> None:
    raise ValueError(
        f"Got a {config.model_type} model with {got}, expected {expected}: MISO cannot train it. Fix: {fix}."
    )
