"""Refuse before training what would be trained wrongly, and say how to fix it.

Limits of a model alone are in `attention/support.py`, of a setting alone in `config.py`, of rows in `data/pipeline.py`.
"""

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import is_flash_attn_2_available, is_kernels_available

from trl_miso.attention.kernels import KernelOptions, resolve_kernel
from trl_miso.attention.mixture import check_window
from trl_miso.attention.support import (
    ModelSupport,
    adapters_of,
    base_of,
    check_adapters,
    check_config,
    check_relative,
    head_dim,
)
from trl_miso.attention.transformers_attention import base_implementation, check_base
from trl_miso.config import MISOSFTConfig
from trl_miso.data.sft_settings import check_tokens
from trl_miso.training.quantized import check_quantization


def check_request(
    args: MISOSFTConfig,
    model: Any,
    data_collator: Any,
    processing_class: Any,
    peft_config: Any,
    quantization_config: Any = None,
) -> PreTrainedConfig:
    """Refuse arguments that are wrong whatever the weights and the data, and return the model's config.

    Raises:
        ValueError: For an argument, a setting or a model config that MISO cannot train with.
        ImportError: If the flash-attn package is asked for and missing.
    """
    if data_collator is not None:
        raise ValueError(
            f"Got data_collator={type(data_collator).__name__}, expected None: the batch layout is part of the method. Fix: leave it "
            "out, and do the work per row in the dataset."
        )
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"Got processing_class={type(processing_class).__name__}, expected a tokenizer: MISO trains on text. Fix: pass "
            "processor.tokenizer."
        )
    if isinstance(processing_class, PreTrainedTokenizerBase):
        check_tokens(args, processing_class)
    check_adapters(model, peft_config)
    _check_lines(args)
    uneven = not (args.accelerator_config.even_batches or args.dataloader_drop_last)
    if args.world_size > 1 and uneven:
        raise ValueError(
            f"Got accelerator_config with even_batches=False and {args.world_size} processes, expected even_batches=True: the other "
            "processes would wait forever for one with fewer batches. Fix: leave even_batches out; the last batches are then filled "
            "up with rows from the beginning."
        )
    if isinstance(model, str):
        _check_flash_package(args)
        loading = ("attn_implementation", "dtype", "torch_dtype", "device_map", "quantization_config")
        options = {k: v for k, v in (args.model_init_kwargs or {}).items() if k not in loading}
        config = AutoConfig.from_pretrained(model, **{"trust_remote_code": args.trust_remote_code, **options})
    else:
        config = model.config
    check_config(config)
    _check_tied_tokens(config, adapters_of(model, peft_config))
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError(
            "Got activation_offloading=True on a CPU, whose memory is where activations would go, expected an accelerator. Fix: set "
            "activation_offloading=False; gradient_checkpointing=True saves memory on a CPU."
        )
    loaded_with = (args.model_init_kwargs or {}).get("quantization_config")
    check_quantization([quantization_config, loaded_with, getattr(config, "quantization_config", None)])
    _check_balancing_loss(args, config)
    _check_attention(args, model, config)
    return config


def _check_tied_tokens(config: PreTrainedConfig, adapters: list[Any]) -> None:
    """Refuse PEFT's trained tokens where input and output share a weight: SFTTrainer's loss reads the output's, without them."""
    if not config.get_text_config().tie_word_embeddings:
        return
    for adapter in adapters:
        indices = getattr(adapter, "trainable_token_indices", None) or getattr(adapter, "token_indices", None)
        if indices is not None:
            raise ValueError(
                "Got an adapter with trained token indices on a model whose input and output embeddings are tied, expected untied ones: "
                "SFTTrainer's loss reads the weight of the output without the adapter. Fix: train the whole embedding with "
                "LoraConfig(modules_to_save=['embed_tokens'], ensure_weight_tying=True)."
            )


def _check_balancing_loss(args: MISOSFTConfig, config: PreTrainedConfig) -> None:
    """Refuse a load-balancing loss that TRL cannot compute: it reads the number of experts from attributes that not all configs have."""
    text = config.get_text_config()
    coefficient = args.router_aux_loss_coef
    if coefficient is None:
        coefficient = getattr(text, "router_aux_loss_coef", 0.0)
    missing = [name for name in ("num_experts", "num_experts_per_tok") if not hasattr(text, name)]
    if coefficient and missing and hasattr(text, "output_router_logits"):
        raise ValueError(
            f"Got a {text.model_type} model with router_aux_loss_coef={coefficient} and a config without {' and '.join(missing)}, which "
            "SFTTrainer's load-balancing loss reads. Expected no such loss. Fix: set router_aux_loss_coef=0."
        )


def _check_flash_package(args: MISOSFTConfig) -> None:
    requested = (args.model_init_kwargs or {}).get("attn_implementation") == "flash_attention_2"
    if requested and not (is_flash_attn_2_available() or is_kernels_available()):
        raise ImportError(
            "Got attn_implementation='flash_attention_2' without a usable flash-attn package, expected the package on a machine with "
            "CUDA. Fix: pip install flash-attn --no-build-isolation, or use the same kernel from torch with "
            "attn_implementation='sdpa' and attention_kernel='torch_flash'."
        )


def _check_attention(args: MISOSFTConfig, model: Any, config: PreTrainedConfig) -> None:
    """Refuse an attention that cannot run before the data are prepared. `check_kernel` runs again on the model that TRL made."""
    if isinstance(model, str):
        options = args.model_init_kwargs or {}
        implementation, dtype = options.get("attn_implementation"), options.get("dtype", "float32")
        weights = config.dtype or torch.float32 if dtype == "auto" else dtype
    else:
        implementation, weights = config.get_text_config()._attn_implementation, base_of(model).dtype
    if isinstance(implementation, dict):  # one per part of the model; "" stands for the rest
        implementation = implementation.get("")
    base = base_implementation(implementation)
    check_base(base)
    weights = getattr(torch, weights) if isinstance(weights, str) else weights
    check_kernel(args, config, weights, base, args.device)


def _check_lines(args: MISOSFTConfig) -> None:
    """Refuse metrics that have a line per bin beside predictions that have a line per row."""
    packs = args.packing if args.eval_packing is None else args.eval_packing
    if packs and "loss" in args.include_for_metrics:
        raise ValueError(
            "Got include_for_metrics=['loss'] with packed evaluation rows, whose losses are those of bins, expected one per row. Fix: "
            "set eval_packing=False, or compute the loss of each row from its predictions."
        )
    if packs and args.eval_use_gather_object:
        raise ValueError(
            "Got eval_use_gather_object=True with packed evaluation rows, expected tensors, in which the rows of each bin are found. "
            "Fix: set eval_packing=False."
        )


def check_parallelism(config: Any) -> None:
    """Refuse parallelism that splits a row across ranks. `config` is accelerate's ParallelismConfig or None."""
    if config is not None and (config.cp_enabled or getattr(config, "sp_enabled", False)):
        raise ValueError(
            "Got context or sequence parallelism, which splits a row's tokens across ranks, expected whole rows on every rank. Fix: "
            "to save memory, use FSDP or DeepSpeed ZeRO-3, and gradient checkpointing."
        )


def check_kernel(
    args: MISOSFTConfig, config: PreTrainedConfig, weights: torch.dtype, base: str, device: torch.device
) -> None:
    """Refuse a kernel that cannot run, before the first step would. `base` is the model's own attention implementation."""
    text = config.get_text_config()
    options = KernelOptions(1.0, softcap=getattr(text, "attn_logit_softcapping", None) or 0.0)
    resolve_kernel(args.attention_kernel, base, device, args.compute_dtype(weights), head_dim(text), options)


def check_checkpointing(args: MISOSFTConfig, model: PreTrainedModel) -> None:
    """Refuse gradient checkpointing, which is on by default, for models that do not support it."""
    if args.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ValueError(
            f"Got gradient_checkpointing=True and {type(model).__name__}, which does not support it, expected a model that does. Fix: "
            "set gradient_checkpointing=False."
        )


def check_positions(args: MISOSFTConfig, mode: str, model_type: str, support: ModelSupport) -> None:
    """Refuse contexts whose positions or sliding windows the model cannot honour.

    Args:
        mode: The mode that rows are trained in.
        model_type: `config.model_type`, for the message.
        support: What the model allows.
    """
    if mode not in ("para", "succ"):
        return
    if mode == "para" and args.output_positions == "successive":
        check_relative(model_type, support)
    if support.window:
        check_window(
            f"a {model_type} model with a sliding window of {support.window} tokens and max_length={args.max_length}",
            mode == "succ" or args.output_positions == "after_longest",
            args.context_weighting,
            f"set max_length <= {support.window}",
        )
