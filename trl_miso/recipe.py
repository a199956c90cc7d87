"""What a training script does with a recipe: options, rows, tokenizer, batch size, training.

recipe, args, model_args = parse_recipe()
train(make_trainer(recipe, args, model_args), recipe)
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_miso.config import MISOSFTConfig
from trl_miso.data.dropped import AnyDataset
from trl_miso.data.mapping import naming
from trl_miso.sources.crab import crab_features, crab_row
from trl_miso.sources.r1_distill import r1_distill_features, r1_distill_row
from trl_miso.sources.sharegpt import sharegpt_features, sharegpt_row
from trl_miso.sources.synthetic import build_model, build_tokenizer, synthetic_rows
from trl_miso.training.trainer import MISOSFTTrainer

_SOURCES = {
    "crab": (crab_row, crab_features),
    "sharegpt": (sharegpt_row, sharegpt_features),
    "r1_distill": (r1_distill_row, r1_distill_features),
}
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
EMBEDDED_ROWS = 800
STREAMED_ROWS = 1000  # read of a stream where nothing says how many


@dataclass
class RecipeArguments(ScriptArguments):
    """[`~trl.ScriptArguments`], and where a recipe's rows come from and how many make a step."""

    source: str = field(
        default="auto",
        metadata={
            "help": "Adapter that the rows go through: 'crab', 'sharegpt', 'r1_distill' (see trl_miso.sources), 'none', or 'auto': "
            "Crab's and ShareGPT's rows are recognised by their columns, others are taken as they are.",
            "choices": ["auto", "none", *_SOURCES],
        },
    )
    instruction_column: str = field(default="input", metadata={"help": "r1_distill: column with the instruction."})
    thinking_column: str | None = field(
        default="reasoning_content",
        metadata={"help": "r1_distill: column with the thinking; 'none' if it is in the response, before </think>."},
    )
    response_column: str = field(default="content", metadata={"help": "r1_distill: column with the response."})
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows (bins, with packing) per optimizer step over all processes; gradient_accumulation_steps is computed from "
            "it, so that a recipe trains the same on any number of GPUs."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check the recipe, prepare its first rows, print statistics, and stop: no GPU, no weights."},
    )
    dry_run_rows: int = field(default=1000, metadata={"help": "Rows that a dry run prepares."})


def parse_recipe(
    arguments: list[str] | None = None, **defaults: Any
) -> tuple[RecipeArguments, MISOSFTConfig, ModelConfig]:
    """Options from the command line, over those of `--config FILE.yaml`, over `defaults`."""
    # Shows what was split, dropped and shared.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_miso").setLevel(logging.INFO)
    parser = TrlParser((RecipeArguments, MISOSFTConfig, ModelConfig))
    # TRL's default of bf16=True is refused on a CPU.
    parser.set_defaults_with_config(**{"bf16": torch.accelerator.is_available()} | defaults)
    recipe, args, model_args = parser.parse_args_and_config(arguments)
    template = args.chat_template_path
    if template and template.endswith((".jinja", ".j2")) and not Path(template).is_file():
        raise ValueError(
            f"Got chat_template_path={template!r}, which is no file in {Path.cwd()}. Expected a path from there. Fix: run from the "
            "folder that the recipe's paths start in (the repository's, for examples/configs), or give an absolute path."
        )
    if recipe.thinking_column in ("none", ""):
        recipe.thinking_column = None
    if recipe.global_batch_size is not None:
        set_global_batch_size(args, recipe.global_batch_size)
    return recipe, args, model_args


def set_global_batch_size(args: MISOSFTConfig, global_batch_size: int) -> None:
    """Set `gradient_accumulation_steps` so that every optimizer step is on `global_batch_size` rows.

    Raises:
        ValueError: If the processes and their batches do not divide it, or other steps were asked for.
    """
    processes = 1 if args.accelerator_config.split_batches else args.world_size
    at_once = args.per_device_train_batch_size * processes
    steps, rest = divmod(global_batch_size, at_once)
    if rest or not steps:
        raise ValueError(
            f"Got global_batch_size={global_batch_size} with {args.world_size} processes of per_device_train_batch_size="
            f"{args.per_device_train_batch_size}, expected it to be a multiple of {at_once}. Fix: change the number of processes or "
            "per_device_train_batch_size so that their product divides it, or set another global_batch_size."
        )
    if args.gradient_accumulation_steps not in (1, steps):
        raise ValueError(
            f"Got gradient_accumulation_steps={args.gradient_accumulation_steps} and global_batch_size={global_batch_size}, which "
            f"needs {steps} of {at_once} rows each. Expected one of the two. Fix: leave gradient_accumulation_steps unset."
        )
    args.gradient_accumulation_steps = steps


def load_rows(recipe: RecipeArguments, split: str) -> AnyDataset:
    """A split (also `train[:1000]`) of a data set on the Hub, of a local file or folder, or generated rows.

    Raises:
        ValueError: If a file cannot be read; the message names where.
    """
    name, streaming = recipe.dataset_name, recipe.dataset_streaming
    if name is None:
        rows = synthetic_rows(EMBEDDED_ROWS + 64)
        return Dataset.from_list(rows[-64:] if split == recipe.dataset_test_split else rows[:-64])
    builder = _BUILDERS.get(Path(name).suffix)
    only = recipe.dataset_train_split.split("[")[0]
    if builder and split.split("[")[0] != only:
        raise ValueError(
            f"Got split {split!r} of the file {name}, which has the split {only!r} alone. Expected a data set with both. Fix: set "
            "eval_strategy='no', or give a folder or a data set with a file a split."
        )
    files = {"data_files": {only: name}} if builder else {"name": recipe.dataset_config}
    try:
        return load_dataset(builder or name, split=split, streaming=streaming, **files)
    except DatasetGenerationError as error:
        raise ValueError(
            f"Got {name}, which cannot be read: {error.__cause__ or error}. Expected rows of the same columns, each of one type. "
            "Fix: correct the rows named above."
        ) from error


def first_rows(dataset: AnyDataset, limit: int | None) -> tuple[Dataset, bool]:
    """The first rows as a map-style data set, and whether these are all."""
    if isinstance(dataset, IterableDataset):
        count = limit or STREAMED_ROWS
        rows = list(islice(dataset, count))
        return Dataset.from_list(rows, features=dataset.features), len(rows) < count
    if limit is None or limit >= len(dataset):
        return dataset, True
    return dataset.select(range(limit)), False


def adapt_rows(dataset: AnyDataset, recipe: RecipeArguments, chat: bool, num_proc: int | None = None) -> AnyDataset:
    """Rows in a format of `trl_miso.data.contexts`; with `chat`, plain-text rows become messages."""
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(
            f"Got no rows in {recipe.dataset_name}, expected at least one. Fix: check the file or the split."
        )
    source = recipe.source
    if source == "auto":
        source = "crab" if {"cnt_id", "messages"} <= set(first) else "sharegpt" if "conversations" in first else "none"
    options: dict[str, Any] = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc}
    if source == "none":
        strings = chat and isinstance(first.get("completion"), str)
        return dataset.map(as_messages, **options) if strings else dataset
    adapter, features = _SOURCES[source]
    columns = ("instruction", "thinking", "response") if source == "r1_distill" else ()
    named = {"adapter": adapter} | {name: getattr(recipe, f"{name}_column") for name in columns}
    options |= {"fn_kwargs": named, "features": features(), "remove_columns": list(first)}
    return dataset.map(_numbered, with_indices=True, **options)


def _numbered(
    row: dict[str, Any], index: int, adapter: Callable[..., dict[str, Any]], **columns: Any
) -> dict[str, Any]:
    """What the adapter makes of a row, its errors with the row's number."""
    with naming(index):
        return adapter(row, **columns)


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    """A plain-text row as a chat row: one user turn a prompt, the completion as the assistant's."""

    def user(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    prompts = {name: user(row[name]) for name in ("prompt", "full_prompt") if row.get(name) is not None}
    contexts = {"contexts": [user(text) for text in row["contexts"]]} if row.get("contexts") else {}
    return prompts | contexts | {"completion": [{"role": "assistant", "content": row["completion"]}]}


def load_tokenizer(dataset: AnyDataset, args: MISOSFTConfig, model_args: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; without a model, one trained on the text of the first rows."""
    if model_args.model_name_or_path is not None:
        return AutoTokenizer.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=args.trust_remote_code,
        )
    return build_tokenizer(
        {"messages": [{"content": text} for text in _texts(row)]} for row in islice(dataset, EMBEDDED_ROWS)
    )


def _texts(value: Any) -> list[str]:
    """All strings in a row."""
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in values for text in _texts(item)]


def is_chat(tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig) -> bool:
    """Whether rows of plain text are to become chat rows: there is a chat template, and no format of the user's own."""
    return bool(tokenizer.chat_template or args.chat_template_path) and args.response_template is None


def make_trainer(recipe: RecipeArguments, args: MISOSFTConfig, model_args: ModelConfig) -> MISOSFTTrainer:
    """The trainer of a recipe; without a model, around a small random Llama whose tokenizer knows the rows' text."""
    rows = load_rows(recipe, recipe.dataset_train_split)
    tokenizer = load_tokenizer(rows, args, model_args)
    options = {"num_proc": args.dataset_num_proc, "chat": is_chat(tokenizer, args)}
    evaluated = None
    if args.eval_strategy != "no":
        evaluated = adapt_rows(load_rows(recipe, recipe.dataset_test_split), recipe, **options)
    return MISOSFTTrainer(
        **_model(tokenizer, args, model_args),
        args=args,
        train_dataset=adapt_rows(rows, recipe, **options),
        eval_dataset=evaluated,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )


def _model(tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig, model_args: ModelConfig) -> dict[str, Any]:
    """The trainer's `model` and `quantization_config`."""
    if model_args.model_name_or_path is None:
        if model_args.attn_implementation or model_args.dtype != ModelConfig().dtype:
            raise ValueError(
                "Got attn_implementation or dtype without a model, expected them unset for the built-in toy model. Fix: set "
                "--model_name_or_path, or leave them out."
            )
        return {"model": build_model(tokenizer)}
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    return {"model": model_args.model_name_or_path, "quantization_config": get_quantization_config(model_args)}


def train(trainer: MISOSFTTrainer, recipe: RecipeArguments) -> None:
    """Train, save to `output_dir`, say how the loss went, and push to the Hub if asked."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    course = f"Training loss: {losses[0]:.2f} -> {losses[-1]:.2f}. " if losses else ""
    trainer.accelerator.print(f"\n{course}Saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.dataset_name)
