"""The settings of a run, kept in its checkpoints: a run that resumes with others is told which. It knows nothing of MISO."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

SETTINGS_FILE = "miso_settings.json"

# Settings of transformers' and TRL's arguments on which the weights depend: which rows, in which batches; how the loss is
# computed; and how the weights follow from its gradient. A version that has no such setting is not asked for it.
RESULT_SETTINGS = (
    *("seed", "data_seed", "train_sampling_strategy", "shuffle_dataset"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "dataloader_drop_last"),
    *("max_length", "truncation_mode", "packing", "packing_strategy", "padding_free"),
    *("dataset_text_field", "dataset_kwargs", "chat_template_path", "eos_token"),
    *("completion_only_loss", "assistant_only_loss"),
    *("loss_type", "router_aux_loss_coef", "label_smoothing_factor", "neftune_noise_alpha"),
    *("average_tokens_across_devices", "bf16", "fp16"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    *("max_steps", "num_train_epochs"),  # the schedule's length, too
    *("optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm",),
)


def settings_of(args: TrainingArguments, names: Iterable[str]) -> dict[str, Any]:
    """The settings of these names that the arguments have, as JSON holds them."""
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return json.loads(json.dumps(values, default=str))


def keep_settings(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Write settings to a checkpoint's folder."""
    (checkpoint / SETTINGS_FILE).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def changed_settings(checkpoint: Path, settings: dict[str, Any]) -> str:
    """A sentence on the settings that differ from those kept in a checkpoint; empty if none does, or none were kept."""
    if not (checkpoint / SETTINGS_FILE).is_file():  # of an earlier version
        return ""
    kept = json.loads((checkpoint / SETTINGS_FILE).read_text(encoding="utf-8"))
    changes = [
        f"{name} is {settings[name]!r}, in the checkpoint {kept[name]!r}"
        for name in settings
        if name in kept and kept[name] != settings[name]
    ]
    if not changes:
        return ""
    return (
        f"Training resumes from {checkpoint} with other settings, and goes on with these: {'; '.join(changes)}. Fix, unless this is "
        "meant: give the checkpoint's settings."
    )
