"""Options as the commands parse them."""

from collections.abc import Sequence
from typing import Any

from trl import ModelConfig

from trl_miso import MISOSFTConfig
from trl_miso.cli.arguments import RecipeParser
from trl_miso.recipe import RecipeArguments


def parse_recipe(arguments: Sequence[str], **defaults: Any) -> tuple[RecipeArguments, MISOSFTConfig, ModelConfig]:
    _, recipe, args, model_args, _ = RecipeParser("test", "", "").parse(arguments, **defaults)
    return recipe, args, model_args
