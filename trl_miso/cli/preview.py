"""`trl-miso preview`, and the dry run of a recipe."""

import json
from copy import copy
from typing import Any

from rich.console import Console
from transformers import AutoConfig, PreTrainedConfig
from trl import ModelConfig, get_peft_config

from trl_miso.attention.support import prepare_model, why_not_share
from trl_miso.attention.transformers_attention import register_miso_attention
from trl_miso.cli.arguments import command_parser, count_from, output_file, parse_command
from trl_miso.cli.preview_terminal import print_preview
from trl_miso.config import MISOSFTConfig
from trl_miso.pages.page import render_page
from trl_miso.preview.prepared import preview_dataset
from trl_miso.preview.statistics import ModelShape, meta_model
from trl_miso.recipe import RecipeArguments, adapt_rows, first_rows, is_chat, load_rows, load_tokenizer
from trl_miso.sources.synthetic import build_model
from trl_miso.training import guards

_USAGE = "trl-miso preview [DATASET] [-n ROWS] [--html FILE] [--json FILE] [--config RECIPE.yaml] [options of a recipe]"
_ABOUT = """\
Show rows as they will be trained on, and statistics over all of them: in the terminal, as a page to scroll and hover
(--html), or as JSON (--json).

DATASET is an id on the Hub, a folder, or a .jsonl, .json, .csv or .parquet file; without one, generated rows. Every option of
examples/train_crab.py is one here (--context_mode, --max_length, --packing, --chat_template_path, --source, ...)."""


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    parser = command_parser(_USAGE, _ABOUT)
    parser.add_argument("-n", type=count_from(0), default=5, metavar="ROWS", help="rows to show (default: 5)")
    parser.add_argument(
        "--rows", type=count_from(1), metavar="N", help="read the first N rows only (of a stream 1000 by default)"
    )
    parser.add_argument("--html", type=output_file, metavar="FILE", help="write one self-contained page")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the statistics")
    options, (recipe, args, model_args) = parse_command(parser, arguments)
    preview, _ = preview_recipe(recipe, args, model_args, options.n, options.rows)
    if options.json:
        options.json.write_text(json.dumps(preview["statistics"], indent=2) + "\n", encoding="utf-8")
    if options.html:
        options.html.write_text(render_page(preview), encoding="utf-8")
    console = Console()
    if not (options.html or options.json):
        print_preview(preview, console)
    for file in filter(None, (options.html, options.json)):
        console.print(f"Wrote {file}", markup=False, highlight=False)


def dry_run(recipe: RecipeArguments, args: MISOSFTConfig, model_args: ModelConfig) -> None:
    """Check a recipe without a GPU or a model's weights: options, model, the first rows; print their statistics.

    Raises:
        ValueError: As training would.
    """
    preview, config = preview_recipe(recipe, args, model_args, 0, recipe.dry_run_rows)
    if args.process_index:
        return
    console = Console()
    print_preview(preview, console)
    _check_model(config, args, preview["statistics"]["mode"])
    at_once, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    lines = (
        f"Model: {config.model_type}, checked by its config alone.",
        f"Step: {at_once * steps * args.world_size} rows = {at_once} x {steps} accumulation steps x {args.world_size} processes.",
        "Dry run passed: nothing was trained.",
    )
    console.print("\n".join(["", *lines]), markup=False, highlight=False, soft_wrap=True)


def preview_recipe(
    recipe: RecipeArguments, args: MISOSFTConfig, model_args: ModelConfig, shown: int, limit: int | None
) -> tuple[dict[str, Any], PreTrainedConfig]:
    """What `preview_dataset` says of the first `limit` training rows (all by default), and the model's config."""
    raw = load_rows(recipe, recipe.dataset_train_split)
    rows, complete = first_rows(raw, limit)
    tokenizer = load_tokenizer(rows, args, model_args)
    rows = adapt_rows(rows, recipe, is_chat(tokenizer, args), args.dataset_num_proc)
    if model_args.model_name_or_path:
        source = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, **source)
        name = model_args.model_name_or_path
    else:
        config, name = build_model(tokenizer).config, "a toy model, a tokenizer built from these rows"
    what = recipe.dataset_name or "generated rows"
    shape = ModelShape.of(config, name)
    dropout = getattr(get_peft_config(model_args), "lora_dropout", 0)
    if dropout or why_not_share(None, config, None):
        args = copy(args)
        args.share_prefixes = False  # as training will
    return preview_dataset(rows, tokenizer, args, shape, name=what, rows=shown, complete=complete), config


def _check_model(config: PreTrainedConfig, args: MISOSFTConfig, mode: str) -> None:
    """Refuse what the model's config is enough to refuse."""
    model = meta_model(config)
    support = prepare_model(model, register_miso_attention("sdpa", args.attention_kernel), args.max_length)
    guards.check_positions(args, mode, config.model_type, support)
