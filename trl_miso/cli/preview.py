"""`trl-miso preview`, and the dry run of a training recipe."""

import json
from typing import Any

from rich.console import Console
from transformers import AutoConfig, PreTrainedConfig
from trl import ModelConfig, get_peft_config

from trl_miso.attention.support import prepare_model, why_not_share
from trl_miso.attention.transformers_attention import register_miso_attention
from trl_miso.cli.arguments import RecipeParser
from trl_miso.cli.parser import count_from, output_file
from trl_miso.cli.preview_terminal import print_preview
from trl_miso.config import MISOSFTConfig
from trl_miso.pages.page import render_page
from trl_miso.preview.prepared import preview_dataset
from trl_miso.preview.statistics import ModelShape, meta_model
from trl_miso.recipe import RecipeArguments, adapt_rows, first_rows, load_rows, load_tokenizer
from trl_miso.sources.synthetic import build_model
from trl_miso.training import guards

_USAGE = "[-n ROWS] [--html FILE] [--json FILE]"
_ABOUT = """\
Show rows as they will be trained on, with statistics of the whole dataset: in the terminal, as an interactive page (--html),
or as JSON (--json). Takes the options of `trl-miso sft` (--context_mode, --max_length, --packing, --chat_template_path, ...)."""

_TOY_TOKENIZER = (
    "the tokenizer is built from these rows, so token counts are not those of a real model. Set --model to count "
    "with its tokenizer."
)


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    parser = RecipeParser("preview", _USAGE, _ABOUT)
    add = parser.add
    add("-n", "--num_rows", type=count_from(0), default=5, metavar="ROWS", help="rows to show (default: 5)")
    add("--rows", type=count_from(1), metavar="N", help="read only the first N rows (default: all; 1000 of a stream)")
    add("--html", type=output_file, metavar="FILE", help="write a self-contained HTML page")
    add("--json", type=output_file, metavar="FILE", help="write the statistics as JSON")
    options, recipe, args, model_args, _ = parser.parse(arguments)
    preview, _ = preview_recipe(recipe, args, model_args, options.num_rows, options.rows)
    if options.json:
        options.json.write_text(json.dumps(preview["statistics"], indent=2) + "\n", encoding="utf-8")
    if options.html:
        options.html.write_text(render_page("preview", preview), encoding="utf-8")
    console = Console()
    if not (options.html or options.json):
        print_preview(preview, console)
        return
    for warning in preview["statistics"]["warnings"]:
        console.print(f"Warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    for file in filter(None, (options.html, options.json)):
        console.print(f"Wrote {file}", markup=False, highlight=False)


def dry_run(recipe: RecipeArguments, args: MISOSFTConfig, model_args: ModelConfig) -> None:
    """Check a recipe's options, model config and first rows, and print statistics. Needs no GPU and no weights.

    Raises:
        ValueError: As training would.
    """
    preview, config = preview_recipe(recipe, args, model_args, 0, recipe.dry_run_rows)
    if args.process_index:
        return
    console = Console()
    print_preview(preview, console)
    _check_model(config, args, preview["statistics"]["mode"])
    batch, steps, processes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
    lines = (
        f"Model: {config.model_type}, checked by its config alone.",
        f"Step: {batch * steps * processes} rows = {batch} x {steps} accumulation steps x {processes} processes.",
        "Dry run passed: nothing was trained.",
    )
    console.print("\n".join(["", *lines]), markup=False, highlight=False, soft_wrap=True)


def preview_recipe(
    recipe: RecipeArguments, args: MISOSFTConfig, model_args: ModelConfig, num_rows: int, limit: int | None
) -> tuple[dict[str, Any], PreTrainedConfig]:
    """Preview the first `limit` training rows of a recipe (None: all). Returns the preview and the model's config."""
    raw = load_rows(recipe, recipe.dataset_train_split)
    rows, complete = first_rows(raw, limit)
    tokenizer = load_tokenizer(rows, args, model_args)
    rows = adapt_rows(rows, recipe, args.dataset_num_proc)
    warnings: list[str] = []
    if model_args.model_name_or_path:
        source = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, **source)
        name = model_args.model_name_or_path
    else:
        config, name = build_model(tokenizer).config, "a toy model"
        warnings.append(_TOY_TOKENIZER)
    shape = ModelShape.of(config, name)
    dropout = getattr(get_peft_config(model_args), "lora_dropout", 0)
    preview = preview_dataset(
        rows,
        tokenizer,
        args,
        shape,
        name=recipe.dataset_name or "generated rows",
        rows=num_rows,
        complete=complete,
        shares_prefixes=not why_not_share(None, config, args.neftune_noise_alpha, dropout),
        warnings=warnings,
    )
    return preview, config


def _check_model(config: PreTrainedConfig, args: MISOSFTConfig, mode: str) -> None:
    """Raise ValueError for a model that its config alone shows to be unsupported."""
    model = meta_model(config)
    support = prepare_model(model, register_miso_attention("sdpa", args.attention_kernel), args.max_length)
    guards.check_positions(args, mode, config.model_type, support)
