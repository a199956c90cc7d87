"""
Mixture-of-Contexts (MISO) fine-tuning on multi-constraint instructions.

Without arguments it trains a small Llama on generated rows in Crab's schema, on a CPU in about a minute:

    accelerate launch examples/train_crab.py

Each of the paper's experiments on Crab (Tables 1 and 2) has a recipe. From the repository's root:

    accelerate launch examples/train_crab.py --config examples/configs/llama3_8b_para.yaml

`--dry_run` checks a recipe without a GPU or weights: options, model, and the first rows with their statistics. `--dataset_name`
takes an id on the Hub, a folder, or a .jsonl, .json, .csv or .parquet file in any row format of trl_miso.data.contexts. Every
field of MISOSFTConfig (context_mode, context_weighting, ...), ModelConfig (use_peft, ...) and RecipeArguments (source,
global_batch_size, ...) is an option here and a key of a recipe.
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from trl_miso import MISOSFTConfig
from trl_miso.cli.preview import dry_run
from trl_miso.recipe import RecipeArguments, load_rows, make_trainer, parse_recipe, train
from trl_miso.sources.crab import crab_row
from trl_miso.sources.synthetic import check_constraints

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


def parse_arguments() -> tuple[RecipeArguments, MISOSFTConfig, ModelConfig]:
    recipe, args, model_args = parse_recipe()
    if not model_args.model_name_or_path:
        return parse_recipe(**EMBEDDED_ARGUMENTS)  # the toy model's defaults; options that were given take precedence
    return recipe, args, model_args


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]]) -> str:
    """Answer greedily by standard inference: the plain model on the plain prompt."""
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        out = model.eval().generate(**inputs.to(model.device), max_new_tokens=40, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def show(title: str, text: str, constraints: list[str]) -> None:
    """Print an answer and which of the constraints it satisfies."""
    print(f"\n{title}: {text}")
    for constraint, satisfied in zip(constraints, check_constraints(constraints, text), strict=True):
        print(f"  {'[x]' if satisfied else '[ ]'} {constraint}")


def main(recipe: RecipeArguments, args: MISOSFTConfig, model_args: ModelConfig) -> None:
    if recipe.dry_run:
        dry_run(recipe, args, model_args)
        return
    trainer = make_trainer(recipe, args, model_args)
    embedded = recipe.dataset_name is None and model_args.model_name_or_path is None
    if not embedded:
        train(trainer, recipe)
        return
    held_out = crab_row(load_rows(recipe, recipe.dataset_test_split)[0])
    question = trainer.model, trainer.processing_class, held_out["full_prompt"]
    before = answer(*question)
    train(trainer, recipe)
    after = answer(*question)  # on every process, since each may hold a part of the model
    if trainer.is_world_process_zero():
        print(f"\nA held-out instruction: {held_out['full_prompt'][-1]['content']}")
        show("Before", before, held_out["constraints"])
        show("After", after, held_out["constraints"])


if __name__ == "__main__":
    main(*parse_arguments())
