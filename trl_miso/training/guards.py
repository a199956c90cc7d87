"""What is refused before training, with what was got, what is expected and how to mend it.

What a model itself cannot do is asked in `attention/support.py`, what a setting cannot be in `config.py`.
"""

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import is_flash_attn_2_available, is_kernels_available

from trl_miso.attention.kernels import resolve_kernel
from trl_miso.attention.mixture import KernelOptions
from trl_miso.attention.support import ModelSupport, check_adapters, check_config, check_relative, head_dim
from trl_miso.config import MISOSFTConfig
from trl_miso.data.dropped import AnyDataset


def check_request(
    args: MISOSFTConfig, model: Any, data_collator: Any, processing_class: Any, peft_config: Any
) -> PreTrainedConfig:
    """Refuse what needs no model or data to be known wrong; return the model's config."""
    if data_collator is not None:
        raise ValueError(
            f"Got data_collator={type(data_collator).__name__}, expected None: the batch layout is part of the method. Fix: drop it, "
            "and do per-row work in the dataset."
        )
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"Got processing_class={type(processing_class).__name__}, expected a tokenizer: MISO trains on text. Fix: pass "
            "processor.tokenizer."
        )
    padding = [getattr(of, name, None) for of in (args, processing_class) for name in ("pad_token", "eos_token")]
    if processing_class is not None and not any(padding):
        raise ValueError(
            "Got a tokenizer with neither a pad nor an eos token, expected one of them to pad with. Fix: set pad_token or eos_token, "
            "of the tokenizer or in the config."
        )
    check_adapters(model, peft_config)
    if args.truncation_mode != "keep_start" and args.context_mode != "single":
        raise ValueError(
            f"Got truncation_mode={args.truncation_mode!r}, expected 'keep_start': the end of an output can be cut, a context cannot. "
            "Fix: set truncation_mode='keep_start'."
        )
    uneven = not (args.accelerator_config.even_batches or args.dataloader_drop_last)
    if args.world_size > 1 and uneven:
        raise ValueError(
            f"Got accelerator_config even_batches=False with {args.world_size} processes, expected True: a process with fewer batches would "
            "leave the others waiting. Fix: leave it out; the last batches are filled up with rows from the beginning."
        )
    if isinstance(model, str):
        _check_flash_attention(args)
        loading = ("attn_implementation", "dtype", "torch_dtype", "device_map", "quantization_config")
        options = {k: v for k, v in (args.model_init_kwargs or {}).items() if k not in loading}
        config = AutoConfig.from_pretrained(model, **{"trust_remote_code": args.trust_remote_code, **options})
    else:
        config = model.config
    check_config(config)
    return config


def check_settings(args: MISOSFTConfig, mode: str, kind: str, columns: list[str]) -> None:
    """Refuse settings of the mixture that these rows leave without effect."""
    weights = "context_weights" in columns and mode == "para"
    left_out = not (args.include_full and args.include_bare)
    positions = args.output_positions != "successive"
    for idle, setting, why in (
        (weights and args.context_weighting != "uniform", "context_weighting", "rows that have context_weights"),
        (weights and args.full_context_weight is not None, "full_context_weight", "rows that have context_weights"),
        (
            left_out and kind == "contexts" and mode != "single",
            "include_full or include_bare",
            "rows that have contexts",
        ),
        (left_out and mode == "succ", "include_full or include_bare", "succ, whose chunks are all of the input"),
        (
            mode == "succ" and args.full_context_weight is not None,
            "full_context_weight",
            "succ, which has no full context",
        ),
        (mode == "succ" and positions, "output_positions", "succ, whose chunks keep their positions"),
    ):
        if idle:
            raise ValueError(
                f"Got {setting} set for {why}: it would have no effect. Expected its default. Fix: leave {setting} unset, or change "
                "the rows or context_mode."
            )
    if weights and kind == "constraints":
        raise ValueError(
            "Got column 'context_weights' beside 'constraints', from which contexts are made: it would have no effect. Expected it "
            "beside 'contexts'. Fix: write the contexts out in column 'contexts', or remove 'context_weights'."
        )


def check_first_row(dataset: AnyDataset | None, args: MISOSFTConfig) -> None:
    """Refuse a first row that TRL, which looks at it alone, would stumble over."""
    if dataset is None:
        return
    row = _first_row(dataset.with_format(None) if isinstance(dataset, Dataset) else dataset, "train")
    values = {name: row[name] for name in ("messages", "prompt", "completion") if name in row}
    empty = [name for name, value in values.items() if value is None or (isinstance(value, list) and not value)]
    if empty and args.assistant_only_loss:
        raise ValueError(
            f"Row 0: Got {row[empty[0]]} in column {empty[0]!r} with assistant_only_loss=True, expected messages: the first row shows "
            "whether rows have turns. Fix: leave the row out."
        )


def _first_row(dataset: AnyDataset, name: str) -> Any:
    if (row := next(iter(dataset), None)) is None:
        raise ValueError(
            f"Got no rows in the {name} dataset, expected at least one. Fix: check the file, the split or the filter."
        )
    return row


def check_dataset(dataset: AnyDataset, args: MISOSFTConfig, packing: bool, name: str) -> None:
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            "Got a dataset with a transform (Dataset.with_transform), which preparation would bake in or read past. Expected stored "
            "columns. Fix: apply the transform with Dataset.map before training."
        )
    _first_row(dataset, name)
    if packing and args.max_length is None:
        raise ValueError("Got packing=True with max_length=None, expected a length to pack to. Fix: set max_length.")


def _check_flash_attention(args: MISOSFTConfig) -> None:
    asked = (args.model_init_kwargs or {}).get("attn_implementation") == "flash_attention_2"
    if asked and not (is_flash_attn_2_available() or is_kernels_available()):
        raise ValueError(
            "Got attn_implementation='flash_attention_2' without a usable flash-attn package, expected it to be installed on a "
            "machine with CUDA. Fix: pip install 'trl-miso[flash]', or use the same kernel from torch with "
            "attn_implementation='sdpa' and attention_kernel='torch_flash'."
        )


def check_parallelism(config: Any) -> None:
    """Refuse to split rows across ranks; `config` is accelerate's ParallelismConfig or None."""
    if config is not None and (config.cp_enabled or getattr(config, "sp_enabled", False)):
        raise ValueError(
            "Got context or sequence parallelism, which splits a row's tokens across ranks; expected every rank to hold whole "
            "rows. Fix: use FSDP or DeepSpeed ZeRO-3, and gradient checkpointing, to save memory."
        )


def check_kernel(args: MISOSFTConfig, model: PreTrainedModel, base: str, device: torch.device) -> None:
    """Refuse a kernel that cannot run now rather than in the first step."""
    config = model.config.get_text_config()
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
    options = KernelOptions(1.0, softcap=getattr(config, "attn_logit_softcapping", None) or 0.0)
    resolve_kernel(args.attention_kernel, base == "flash_attention_2", device, dtype, head_dim(config), options)


def check_positions(args: MISOSFTConfig, mode: str, model_type: str, support: ModelSupport) -> None:
    """Refuse contexts whose positions or windows the model cannot honour; `mode` is what rows are trained in."""
    mixes, para = mode in ("para", "succ"), mode == "para"
    if para and args.output_positions == "successive":
        check_relative(model_type, support)
    if support.window and mixes and args.context_weighting == "vanilla":
        raise ValueError(
            f"Got context_weighting='vanilla' with a {model_type} model, whose sliding window of {support.window} tokens is shorter "
            f"than max_length={args.max_length}: one softmax over all contexts cannot honour it. Expected max_length <= "
            f"{support.window}. Fix: set max_length={support.window}, or context_weighting='uniform' or 'fid'."
        )
    gap = mixes and (not para or args.output_positions == "after_longest")
    if support.window and gap:
        raise ValueError(
            f"Got a {model_type} model with a sliding window of {support.window} tokens and max_length={args.max_length}, with "
            f"{'succ chunks' if not para else 'after_longest positions'}: contexts that do not end where their output begins "
            f"cannot honour a window shorter than a row. Expected max_length <= {support.window}. Fix: set max_length="
            f"{support.window}, or train on para contexts with output_positions='successive'."
        )
