"""The steps of a training script: rows, tokenizer, trainer, training.

    train(make_trainer(recipe, args, model_args), recipe)

The options come from the command line and from a recipe, a YAML file such as `recipes/llama3_8b_para.yaml`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from trl_miso.config import MISOSFTConfig
from trl_miso.data.dropped import AnyDataset
from trl_miso.data.mapping import naming, of_this_code
from trl_miso.recipes import SHIPPED, check_path, find_file, similar_path
from trl_miso.sources.alpaca import alpaca_features, alpaca_row
from trl_miso.sources.conifer import conifer_features, conifer_row
from trl_miso.sources.crab import crab_features, crab_row
from trl_miso.sources.r1_distill import r1_distill_features, r1_distill_row
from trl_miso.sources.sharegpt import sharegpt_features, sharegpt_row
from trl_miso.sources.synthetic import build_model, build_tokenizer, synthetic_rows
from trl_miso.sources.tulu_persona import tulu_persona_features, tulu_persona_row
from trl_miso.sources.ultraif import ultraif_features, ultraif_row
from trl_miso.training.trainer import MISOSFTTrainer

_SOURCES = {
    "crab": (crab_row, crab_features),
    "sharegpt": (sharegpt_row, sharegpt_features),
    "r1_distill": (r1_distill_row, r1_distill_features),
    "tulu_persona": (tulu_persona_row, tulu_persona_features),
    "ultraif": (ultraif_row, ultraif_features),
    "conifer": (conifer_row, conifer_features),
    "alpaca": (alpaca_row, alpaca_features),
}
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
EMBEDDED_ROWS = 800  # generated training rows, and rows that a tokenizer is trained on
STREAMED_ROWS = 1000  # rows to read of a stream where no limit is given


@dataclass
class RecipeArguments(ScriptArguments):
    """[`~trl.ScriptArguments`], and the source of a recipe's rows, the batch size over all processes, and the dry run."""

    source: str = field(
        default="auto",
        metadata={
            "help": "Adapter applied to the rows: 'crab', 'sharegpt', 'r1_distill', 'tulu_persona', 'ultraif', 'conifer', 'alpaca' (see "
            "trl_miso.sources), 'none', or 'auto', which recognises all but 'r1_distill' by their columns and leaves other rows as they are.",
            "choices": ["auto", "none", *_SOURCES],
        },
    )
    as_messages: bool = field(
        default=False,
        metadata={
            "help": "Make rows of strings chat rows: each prompt and context becomes a user turn, the completion an assistant turn. "
            "Without it they are trained as plain text."
        },
    )
    instruction_column: str = field(default="input", metadata={"help": "r1_distill: column with the instruction."})
    thinking_column: str | None = field(
        default="reasoning_content",
        metadata={"help": "r1_distill: column with the thinking; 'none' if the response holds it, before </think>."},
    )
    response_column: str = field(default="content", metadata={"help": "r1_distill: column with the response."})
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows (bins, with packing) per optimizer step over all processes. gradient_accumulation_steps is computed from "
            "it, so that a recipe trains the same on any number of GPUs."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Check the recipe, prepare its first rows, print statistics and stop. Needs no GPU and no weights."
        },
    )
    dry_run_rows: int = field(default=1000, metadata={"help": "Rows that a dry run prepares."})


def complete_recipe(recipe: RecipeArguments, args: MISOSFTConfig) -> None:
    """Find the chat template by its name, and compute the accumulation steps of the global batch size.

    Raises:
        ValueError: If the chat template's file is missing, or the global batch size does not fit.
    """
    template = args.chat_template_path
    is_name = template in SHIPPED["chat template"] and not Path(template).exists()
    if is_name or (template and template.endswith((".jinja", ".j2"))):
        args.chat_template_path = str(find_file("chat template", template))
    if recipe.thinking_column in ("none", ""):
        recipe.thinking_column = None
    if recipe.global_batch_size is not None:
        set_global_batch_size(args, recipe.global_batch_size)


def set_global_batch_size(args: MISOSFTConfig, global_batch_size: int) -> None:
    """Set `gradient_accumulation_steps` so that every optimizer step takes `global_batch_size` rows over all processes.

    Raises:
        ValueError: If it is not a multiple of the rows that all processes take at once, if the number of accumulation steps
            was set to another value, or if `auto_find_batch_size` could lower the rows per process.
    """
    if args.auto_find_batch_size:
        raise ValueError(
            f"Got auto_find_batch_size=True and global_batch_size={global_batch_size}, expected one of the two: a batch size lowered when "
            "memory runs out leaves the accumulation steps as they are. Fix: leave auto_find_batch_size out, and lower "
            "per_device_train_batch_size."
        )
    processes = 1 if args.accelerator_config.split_batches else args.world_size
    rows_at_once = args.per_device_train_batch_size * processes
    steps, rest = divmod(global_batch_size, rows_at_once)
    if rest or not steps:
        raise ValueError(
            f"Got global_batch_size={global_batch_size} with {args.world_size} processes of per_device_train_batch_size="
            f"{args.per_device_train_batch_size}, expected it to be a multiple of {rows_at_once}. Fix: change the number of processes or "
            "per_device_train_batch_size so that their product divides it, or set another global_batch_size."
        )
    if args.gradient_accumulation_steps not in (1, steps):
        raise ValueError(
            f"Got gradient_accumulation_steps={args.gradient_accumulation_steps} and global_batch_size={global_batch_size}, which "
            f"needs {steps} of {rows_at_once} rows each. Expected one of the two. Fix: leave gradient_accumulation_steps unset."
        )
    args.gradient_accumulation_steps = steps


def load_rows(recipe: RecipeArguments, split: str) -> AnyDataset:
    """Load a split of a data set on the Hub, or of a local folder or file; without `dataset_name`, generate rows.

    Args:
        split: A name, or a slice such as `train[:1000]`.

    Raises:
        ValueError: If a file cannot be read (the message names the row), or has no such split.
    """
    name, streaming = recipe.dataset_name, recipe.dataset_streaming
    if name is None:
        rows = synthetic_rows(EMBEDDED_ROWS + 64)
        return Dataset.from_list(rows[-64:] if split == recipe.dataset_test_split else rows[:-64])
    check_path(name, _BUILDERS)
    if Path(name).is_file() and not Path(name).stat().st_size:
        raise ValueError(f"Got {name}, which is empty, expected at least one row. Fix: check the file.")
    builder = _BUILDERS.get(Path(name).suffix)
    train_split = recipe.dataset_train_split.split("[")[0]
    if builder and split.split("[")[0] != train_split:
        raise ValueError(
            f"Got split {split!r} of the file {name}, which has the split {train_split!r} alone. Expected a data set with both. "
            "Fix: set eval_strategy='no', or give a folder or a data set with one file per split."
        )
    files = {"data_files": {train_split: name}} if builder else {"name": recipe.dataset_config}
    try:
        return load_dataset(builder or name, split=split, streaming=streaming, **files)
    except DatasetGenerationError as error:
        raise ValueError(
            f"Got {name}, which cannot be read: {error.__cause__ or error}. Expected rows with the same columns, one type per column. "
            "Fix: correct the rows named above."
        ) from error


def first_rows(dataset: AnyDataset, limit: int | None) -> tuple[Dataset, bool]:
    """The first `limit` rows as a map-style data set, and whether these are all rows."""
    if isinstance(dataset, IterableDataset):
        count = limit or STREAMED_ROWS
        rows = list(islice(dataset, count))
        return Dataset.from_list(rows, features=dataset.features), len(rows) < count
    if limit is None or limit >= len(dataset):
        return dataset, True
    return dataset.select(range(limit)), False


def adapt_rows(dataset: AnyDataset, recipe: RecipeArguments, num_proc: int | None = None) -> AnyDataset:
    """Apply the recipe's source and `as_messages`, so that rows have a format of `trl_miso.data.schema`.

    Raises:
        ValueError: If there are no rows, the source cannot read one (the message names the row), or `as_messages` is set for rows
            that are not strings.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(
            f"Got no rows in {recipe.dataset_name}, expected at least one. Fix: check the file or the split."
        )
    source = _source_of(first) if recipe.source == "auto" else recipe.source
    if recipe.as_messages:
        if source != "none" or not isinstance(first.get("completion"), str):
            raise ValueError(
                f"Got as_messages=True and rows with columns {list(first)}, which are messages already, by themselves or by "
                "their source, or have no completion. Expected rows of strings with a completion. Fix: leave as_messages out."
            )
        return dataset.map(
            of_this_code(_chat_row), **({} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc})
        )
    if source == "none":
        return dataset
    adapter, features = _SOURCES[source]
    arguments: dict[str, Any] = {}
    if source == "r1_distill":
        arguments["instruction"] = recipe.instruction_column
        arguments["thinking"] = recipe.thinking_column
        arguments["response"] = recipe.response_column
    return apply_adapter(dataset, adapter, features(), list(first), f"Reading rows of {source}", num_proc, **arguments)


def apply_adapter(
    dataset: AnyDataset,
    adapter: Callable[..., dict[str, Any]],
    features: Features,
    columns: list[str],
    desc: str,
    num_proc: int | None = None,
    **arguments: Any,
) -> AnyDataset:
    """Replace the rows' `columns` by what the adapter returns for a row and `arguments`; its errors name the row."""
    options: dict[str, Any] = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc, "desc": desc}
    options |= {"fn_kwargs": {"adapter": adapter, **arguments}, "features": features, "remove_columns": columns}
    return dataset.map(of_this_code(_adapt_row), with_indices=True, **options)


def _source_of(row: dict[str, Any]) -> str:
    """Recognise the source of a row by its columns: the data set's own, where others use some of them too."""
    columns = set(row)
    if {"cnt_id", "messages"} <= columns:
        return "crab"
    if "conversations" in row:
        return "sharegpt"
    if {"prompt", "messages", "constraints"} <= columns and not columns & {"completion", "contexts"}:
        return "tulu_persona"
    if columns == {"prompt", "messages", "type"}:
        return "conifer"
    if columns == {"instruction", "output", "history"}:
        return "ultraif"
    if columns - {"text"} == {"instruction", "input", "output"}:
        return "alpaca"
    return "none"


def _adapt_row(
    row: dict[str, Any], index: int, adapter: Callable[..., dict[str, Any]], **columns: Any
) -> dict[str, Any]:
    """Apply the adapter to a row; its errors name the row's number."""
    with naming(index):
        return adapter(row, **columns)


def _chat_row(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a row of plain text into a chat row: one user turn per prompt and context, the completion as assistant turn."""

    def user(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    columns: dict[str, Any] = {}
    for name in ("prompt", "full_prompt"):
        if row.get(name) is not None:
            columns[name] = user(row[name])
    if row.get("contexts"):
        columns["contexts"] = [user(text) for text in row["contexts"]]
    columns["completion"] = [{"role": "assistant", "content": row["completion"]}]
    return columns


def load_tokenizer(dataset: AnyDataset, args: MISOSFTConfig, model_args: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; without a model, train one on the text of the first rows.

    Raises:
        ValueError: If there is no such model, or it has no tokenizer.
    """
    name = model_args.model_name_or_path
    if name is not None:
        check_path(name)
        source = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
        try:
            return AutoTokenizer.from_pretrained(name, **source)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")
            raise ValueError(
                f"Got the model {name!r}, whose tokenizer cannot be loaded: {reason}.{similar_path(name)} Expected a folder or an id on "
                "the Hub. Fix: correct --model."
            ) from error
    return build_tokenizer(
        {"messages": [{"content": text} for text in _texts(row)]} for row in islice(dataset, EMBEDDED_ROWS)
    )


def _texts(value: Any) -> list[str]:
    """All strings in a row or in one of its values, at any depth."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return []
    return [text for item in value for text in _texts(item)]


def make_trainer(recipe: RecipeArguments, args: MISOSFTConfig, model_args: ModelConfig) -> MISOSFTTrainer:
    """Build the trainer of a recipe. Without a model, train a small random Llama with a tokenizer built from the rows."""
    rows = load_rows(recipe, recipe.dataset_train_split)
    tokenizer = load_tokenizer(rows, args, model_args)
    train_rows, eval_rows = adapt_rows(rows, recipe, args.dataset_num_proc), None
    if args.eval_strategy != "no":
        eval_rows = adapt_rows(load_rows(recipe, recipe.dataset_test_split), recipe, args.dataset_num_proc)
    return MISOSFTTrainer(
        **_model(tokenizer, args, model_args),
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )


def _model(tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig, model_args: ModelConfig) -> dict[str, Any]:
    """The trainer's arguments `model` and `quantization_config`."""
    if model_args.model_name_or_path is None:
        if model_args.attn_implementation or model_args.dtype != ModelConfig().dtype:
            raise ValueError(
                "Got attn_implementation or dtype without a model, expected neither for the built-in toy model. Fix: set "
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
    """Train, save the model to `output_dir`, print the first and last loss, and push to the Hub with `push_to_hub`."""
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    summary = f"Training loss: {losses[0]:.2f} -> {losses[-1]:.2f}. " if losses else ""
    trainer.accelerator.print(f"\n{summary}Saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.dataset_name)
