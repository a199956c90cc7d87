"""What the package stands on in TRL, transformers and accelerate that their documentation does not promise.

Before a bound in pyproject.toml is raised, `tests/test_private_names.py` names what the new version lacks. Its other tests keep
the lists complete: a name that the package uses, and that stands in none of them, fails.
"""

import inspect
from importlib import import_module
from typing import Any

# Path -> (parameters that the package relies on, what for). Parameters before "*" are given by position, the others by name.
NAMES = {
    # TRL: the trainer's methods and attributes of its class.
    "trl.SFTTrainer._prepare_dataset": (
        "dataset processing_class args packing formatting_func dataset_name",
        "overridden: rows become contexts; the preview calls it without a trainer",
    ),
    "trl.SFTTrainer._set_signature_columns_if_needed": ("", "overridden: MISO's columns stay"),
    "trl.SFTTrainer._name": ("", "the model card"),
    "trl.SFTTrainer._paper": ("", "the model card"),
    "trl.SFTTrainer._tag_names": ("", "the model card"),
    # TRL: functions.
    "trl.chat_template_utils.get_training_chat_template": (
        "processing_class",
        "the preview sets a tokenizer up as SFTTrainer",
    ),
    "trl.chat_template_utils.has_generation_markers": (
        "chat_template",
        "the preview sets a tokenizer up as SFTTrainer",
    ),
    "trl.data_utils.get_dataset_column_names": ("dataset", "columns, also of a stream that does not know them"),
    "trl.data_utils.is_conversational": ("example", "the rule by which SFTTrainer takes rows as conversations"),
    "trl.trainer.utils.get_config_model_id": ("config", "names of the model's tokenizer, the output folder, the card"),
    # accelerate: the launcher, as TRL's command line uses it.
    "accelerate.commands.launch.launch_command": ("args", "trl-miso sft starts processes"),
    "accelerate.commands.launch.launch_command_parser": ("", "trl-miso sft takes the launcher's options"),
    # transformers: the trainer.
    "transformers.Trainer._finalize_training": ("", "overridden: the final weights are scored before trackers close"),
    "transformers.Trainer._finish_current_push": ("", "waits for an upload that reads files about to be written"),
    "transformers.Trainer._get_dataloader": (
        "dataset * description batch_size is_training",
        "overridden: every rank reads streams in full; evaluation batches keep their rows",
    ),
    "transformers.Trainer._get_grad_norm": ("model grad_norm", "overridden: gradients that are not finite"),
    "transformers.Trainer._get_output_dir": ("trial", "overridden: a checkpoint is written to a temporary folder"),
    "transformers.Trainer._init_training_state": (
        "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint",
        "overridden: where a stream resumes",
    ),
    "transformers.Trainer._load_best_model": ("", "overridden: adapters with a name of their own"),
    "transformers.Trainer._prepare_inputs": ("inputs", "batches of predictions"),
    "transformers.Trainer._push_from_checkpoint": ("checkpoint_folder", "overridden: complete checkpoints alone"),
    "transformers.Trainer._run_epoch": (
        "* resume_from_checkpoint epoch epochs_trained",
        "overridden: resuming at an end",
    ),
    "transformers.Trainer._save_rng_state": ("output_dir", "overridden: random numbers at the end of a stream's pass"),
    "transformers.Trainer._save": ("output_dir state_dict", "overridden: the token stays out of files"),
    "transformers.Trainer._save_checkpoint": ("model trial", "overridden: atomic checkpoints"),
    "transformers.Trainer.save_model": ("* _internal_call", "saves without a push, after a push has failed"),
    "transformers.trainer.OPTIMIZER_NAME": ("", "whether a checkpoint is complete"),
    "transformers.trainer.TRAINER_STATE_NAME": ("", "whether a checkpoint is complete"),
    "transformers.trainer_utils.PREFIX_CHECKPOINT_DIR": ("", "names of checkpoints"),
    "transformers.trainer_utils.PredictionOutput": ("", "an annotation"),
    "transformers.trainer_utils.TrainOutput": ("", "an annotation"),
    "transformers.trainer_utils.rotate_checkpoints": (
        "output_dir save_total_limit best_model_checkpoint * use_mtime",
        "old checkpoints go once the new one has its name",
    ),
    "transformers.trainer_utils.sort_checkpoints": ("output_dir", "the newest checkpoint"),
    "transformers.utils.PushInProgress": ("jobs", "uploads that run in the background"),
    # transformers: attention and models.
    "transformers.integrations.flash_attention.get_target_dtype": ("query module", "FlashAttention-2 without metadata"),
    "transformers.integrations.hub_kernels.load_and_register_attn_kernel": (
        "attn_implementation",
        "loads the Hub's FlashAttention-2",
    ),
    "transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS": ("", "masks of the base implementation"),
    "transformers.masking_utils.AttentionMaskInterface": ("", "registers the mask of MISO attention"),
    "transformers.modeling_flash_attention_utils._flash_attention_forward": (
        "query_states key_states value_states attention_mask * query_length is_causal softmax_scale use_top_left_mask "
        "target_dtype attn_implementation",
        "FlashAttention-2 without metadata",
    ),
    "transformers.modeling_flash_attention_utils.flash_attn_supports_top_left_mask": (
        "",
        "FlashAttention-2 without metadata",
    ),
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": ("", "attention of the base implementation"),
    "transformers.PreTrainedConfig._attn_implementation": ("", "the implementation that MISO attention stands in for"),
    "transformers.PreTrainedConfig.sub_configs": ("", "implementations of a model's parts, to restore them"),
    "transformers.GenerationMixin._supports_logits_to_keep": ("", "forwards whose logits are not used"),
    "transformers.DynamicCache.is_linear": (
        "",
        "overridden: `generate` feeds the new ids alone to a cache of contexts",
    ),
    # transformers: names that each model's module has, here those of Llama.
    "transformers.models.llama.modeling_llama.apply_rotary_pos_emb": ("q k cos sin", "turns keys by further positions"),
    "transformers.models.llama.modeling_llama.eager_attention_forward": (
        "module query key value attention_mask",
        "eager attention without metadata",
    ),
    "transformers.models.llama.modeling_llama.LlamaAttention": (
        "",
        "attention modules are found by the end of their name",
    ),
    "transformers.models.llama.modeling_llama.LlamaRotaryEmbedding": ("", "as are rotary embeddings"),
    # transformers: tokenizers and files.
    "transformers.PreTrainedTokenizerFast._encode_plus": ("", "whether a tokenizer encodes in a way of its own"),
    "transformers.convert_slow_tokenizer.bytes_to_unicode": ("", "the text of byte-level tokens"),
    "transformers.utils.hub.cached_file": ("path_or_repo_id filename", "the commit of a model on the Hub"),
    "transformers.utils.hub.cached_files": (
        "* _raise_exceptions_for_gated_repo _raise_exceptions_for_missing_entries _raise_exceptions_for_connection_errors",
        "what `cached_file` hands on",
    ),
    "transformers.utils.hub.extract_commit_hash": ("resolved_file commit_hash", "the commit of a model on the Hub"),
    "transformers.utils.is_flash_attn_2_available": ("", "refuses FlashAttention-2 before weights are loaded"),
    "transformers.utils.is_kernels_available": ("", "refuses FlashAttention-2 before weights are loaded"),
    "transformers.utils.is_peft_available": ("", "refuses adapters without PEFT"),
    "transformers.utils.logging": ("", "the log in one style with transformers'"),
    "transformers.utils.logging.tqdm": ("", "progress bars that transformers' settings turn off"),
    # accelerate.
    "accelerate.state.GradientState.end_of_dataloader": ("", "the bins that fill a last batch up"),
    "accelerate.state.GradientState.remainder": ("", "the bins that fill a last batch up"),
    "accelerate.utils.memory.should_reduce_batch_size": ("exception", "tells errors of too little memory from others"),
}

# Attribute of a constructed SFTTrainer -> what for.
ATTRIBUTES = {
    "_formatting_func": "rows to predict are prepared as evaluation rows",
    "_metrics": "metrics of the mixture join TRL's, by mode",
    "_signature_columns": "set: MISO's columns stay",
    "_skip_prepare_dataset": "rows to predict that are prepared already",
    "_tokenizer": "the tokenizer, once TRL has set it up",
    "callback_handler": "finds the callbacks that score held-out prompts",
    "chat_template": "TRL's template with generation markers",
    "completion_only_loss": "set: TRL's preparation of single and augment trains completions",
    "model_wrapped": "the model that answers held-out prompts under DeepSpeed and FSDP",
}


def missing(path: str, parameters: str = "") -> str:
    """What the installed versions lack of a name and of its parameters; empty if nothing."""
    names = path.split(".")
    value: Any = None
    for end, name in enumerate(names, start=1):
        try:
            value = import_module(
                ".".join(names[:end])
            )  # before an attribute: a module may hold a function of its own name
        except ImportError:
            if not hasattr(value, name):
                return f"{path} is gone"
            value = getattr(value, name)
    if not parameters:
        return ""
    actual = [name for name in inspect.signature(value).parameters if name != "self"]
    positional, _, keywords = parameters.partition("*")
    expected = positional.split()
    if actual[: len(expected)] != expected:
        return f"{path} takes {actual}, expected {expected} first"
    absent = set(keywords.split()) - set(actual)
    return f"{path} no longer takes {sorted(absent)}" if absent else ""
