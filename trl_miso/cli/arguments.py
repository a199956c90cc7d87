"""Argument parsing shared by the console commands."""

import argparse
from collections.abc import Callable
from pathlib import Path

from trl import ModelConfig

from trl_miso.config import MISOSFTConfig
from trl_miso.recipe import RecipeArguments, parse_recipe


def command_parser(usage: str, description: str) -> argparse.ArgumentParser:
    """A parser that prints `description` as it is written and takes no abbreviated options."""
    return argparse.ArgumentParser(
        usage=usage,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse_command(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, tuple[RecipeArguments, MISOSFTConfig, ModelConfig]]:
    """Parse `[DATASET] [options of the command] [--config RECIPE.yaml] [options of a recipe]`.

    Returns:
        The command's options, and the recipe, config and model arguments of `parse_recipe`.
    """
    parser.add_argument("--config", metavar="RECIPE.yaml", help="read options from a training recipe")
    options, others = parser.parse_known_args(arguments)
    dataset_name = None
    if others and not others[0].startswith("-"):
        dataset_name = others.pop(0)
    if options.config:
        others += ["--config", options.config]
    defaults = {"dataset_name": dataset_name} if dataset_name else {}
    recipe, args, model_args = parse_recipe(others, **defaults)
    if dataset_name:
        recipe.dataset_name = dataset_name  # over the recipe's
    return options, (recipe, args, model_args)


def count_from(least: int) -> Callable[[str], int]:
    """argparse type: a whole number of at least `least`."""

    def count(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least {least}")
        return int(text)

    return count


def output_file(text: str) -> Path:
    """argparse type: an output path whose folder exists, so that a long run cannot fail at its end."""
    file = Path(text)
    if file.is_dir() or not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a file in a folder that exists")
    return file
