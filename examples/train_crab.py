"""
Mixture-of-Contexts (MISO) fine-tuning on multi-constraint instructions.

With no arguments, an embedded default: generated rows in Crab's schema and a small Llama, on a CPU in about a minute.

    accelerate launch examples/train_crab.py

On Crab (a hub id, or a local .jsonl / .parquet file in any row format of trl_miso.contexts):

    accelerate launch examples/train_crab.py \
        --model_name_or_path meta-llama/Meta-Llama-3-8B \
        --dataset_name THU-KEG/Crab-SFT \
        --attn_implementation flash_attention_2 \
        --chat_template_path path/to/template.jinja \
        --max_length 4096 --packing \
        --learning_rate 5e-6 --warmup_steps 0.1 --num_train_epochs 3 \
        --per_device_train_batch_size 1 --gradient_accumulation_steps 32 \
        --output_dir Llama-3-8B-MISO

Every field of MISOSFTConfig (context_mode, context_weighting, ...), ModelConfig (use_peft, ...) and ScriptArguments is an
option; `--config FILE.yaml` reads them from a file.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.sources.crab import crab_features, crab_row
from trl_miso.sources.synthetic import build_model, build_tokenizer, check_constraints, synthetic_rows

EMBEDDED_ROWS = 800
EMBEDDED_ARGUMENTS = {
    "output_dir": "crab-miso",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 16,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
}


def parse_arguments() -> tuple[ScriptArguments, MISOSFTConfig, ModelConfig]:
    parser = TrlParser((ScriptArguments, MISOSFTConfig, ModelConfig))
    parser.set_defaults_with_config(bf16=torch.accelerator.is_available())  # TRL's default of True is refused on a CPU
    arguments = parser.parse_args_and_config()
    if arguments[2].model_name_or_path is not None:
        return arguments
    parser.set_defaults_with_config(**EMBEDDED_ARGUMENTS)  # the toy model's; whatever was given stays
    return parser.parse_args_and_config()


def load_rows(script_args: ScriptArguments) -> DatasetDict | IterableDatasetDict:
    """The data set of the arguments, or generated rows split into train and test."""
    name = script_args.dataset_name
    if name is None:
        rows = synthetic_rows(EMBEDDED_ROWS + 64)
        return DatasetDict(train=Dataset.from_list(rows[:-64]), test=Dataset.from_list(rows[-64:]))
    suffix = Path(name).suffix
    if suffix in (".jsonl", ".json", ".parquet"):
        kind = "parquet" if suffix == ".parquet" else "json"
        return load_dataset(
            kind, data_files={script_args.dataset_train_split: name}, streaming=script_args.dataset_streaming
        )
    return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)


def adapt(dataset: Any, chat: bool) -> Any:
    """Crab rows as prompt, constraints, completion; plain-text rows as chat messages if the model is a chat model."""
    first = next(iter(dataset))
    if "cnt_id" in first and "messages" in first:
        return dataset.map(crab_row, remove_columns=list(first), features=crab_features())
    return dataset.map(as_messages) if chat and isinstance(first.get("completion"), str) else dataset


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    def user(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    prompts = {name: user(row[name]) for name in ("prompt", "full_prompt") if row.get(name) is not None}
    contexts = {"contexts": [user(text) for text in row["contexts"]]} if row.get("contexts") else {}
    return prompts | contexts | {"completion": [{"role": "assistant", "content": row["completion"]}]}


def toy_model(dataset: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A tokenizer built from the rows' own text, and a small random Llama."""
    rows = [row for _, row in zip(range(EMBEDDED_ROWS), dataset, strict=False)]
    texts = [
        row if "messages" in row else {"messages": [{"content": str(value)} for value in row.values()]} for row in rows
    ]
    tokenizer = build_tokenizer(texts)
    return build_model(tokenizer), tokenizer


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]]) -> str:
    """Greedy answer by standard inference: the plain model on the plain prompt."""
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        out = model.eval().generate(**inputs.to(model.device), max_new_tokens=40, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def show(title: str, text: str, constraints: list[str]) -> None:
    marks = check_constraints(constraints, text)
    print(f"\n{title}: {text}")
    print("\n".join(f"  {'[x]' if mark else '[ ]'} {c}" for mark, c in zip(marks, constraints, strict=True)))


def main(script_args: ScriptArguments, training_args: MISOSFTConfig, model_args: ModelConfig) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("trl_miso").setLevel(logging.INFO)
    embedded = script_args.dataset_name is None and model_args.model_name_or_path is None
    dataset = load_rows(script_args)
    train = dataset[script_args.dataset_train_split]
    if model_args.model_name_or_path is None:
        if model_args.attn_implementation or model_args.dtype != ModelConfig().dtype:
            raise ValueError(
                "Got attn_implementation or dtype without a model, expected them unset for the built-in toy model. Fix: set "
                "--model_name_or_path, or leave them out."
            )
        model, tokenizer = toy_model(train)
    else:
        model = model_args.model_name_or_path
        source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(model, **source)
        training_args.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            **(training_args.model_init_kwargs or {}),
        }
    chat = bool(tokenizer.chat_template or training_args.chat_template_path) and training_args.response_template is None
    evaluates = training_args.eval_strategy != "no"
    if evaluates and script_args.dataset_test_split not in dataset:
        raise ValueError(
            f"Got eval_strategy={training_args.eval_strategy!r} and a data set with splits {list(dataset)}, expected one named "
            f"{script_args.dataset_test_split!r}. Fix: set --dataset_test_split, or --eval_strategy no."
        )
    trainer = MISOSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=adapt(train, chat),
        eval_dataset=adapt(dataset[script_args.dataset_test_split], chat) if evaluates else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args) if model_args.model_name_or_path else None,
        peft_config=get_peft_config(model_args),
    )
    held_out = crab_row(dataset["test"][0]) if embedded else None
    before = answer(trainer.model, tokenizer, held_out["full_prompt"]) if held_out else ""

    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    course = f"Training loss: {losses[0]:.2f} -> {losses[-1]:.2f}. " if losses else ""
    trainer.accelerator.print(f"\n{course}Saved to {training_args.output_dir}.")
    if held_out and trainer.is_world_process_zero():
        print(f"\nA held-out instruction: {held_out['full_prompt'][-1]['content']}")
        show("Before", before, held_out["constraints"])
        show("After", answer(trainer.model, tokenizer, held_out["full_prompt"]), held_out["constraints"])
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    main(*parse_arguments())
