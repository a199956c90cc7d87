"""The options that commands share: a training recipe's, MISO's first, from the command line and from YAML files."""

import argparse
import os
import re
from collections.abc import Iterable, Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from trl import ModelConfig, TrlParser

from trl_miso.cli.parser import CommandParser
from trl_miso.config import MISOSFTConfig
from trl_miso.recipe import RecipeArguments, complete_recipe
from trl_miso.recipes import did_you_mean, find_file

_WORDS_OF_FLAGS = {"yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"}  # what a flag may be followed by

# The options of TRL and transformers that the short help shows.
_MOST_USED = (
    "model_name_or_path",
    "chat_template_path",
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
    "bf16",
    "gradient_checkpointing",
    "seed",
    "use_peft",
    "lora_r",
    "load_in_4bit",
    "attn_implementation",
    "dtype",
    "eval_strategy",
    "save_strategy",
    "resume_from_checkpoint",
    "logging_steps",
    "report_to",
    "push_to_hub",
    "hub_model_id",
)
_ALIASES = {"--model_name_or_path": "--model", "--dataset_name": "--dataset"}
_OWN = "options of this command"
_DATASET = (
    "DATASET is an id on the Hub, a folder, or a .jsonl, .json, .csv or .parquet file. Without it, rows are generated."
)


class Parsed(NamedTuple):
    """What `RecipeParser.parse` returns. `options`: the command's own."""

    options: argparse.Namespace
    recipe: RecipeArguments
    args: MISOSFTConfig
    model_args: ModelConfig
    others: list[str]  # arguments that the parser does not know


class RecipeParser(CommandParser, TrlParser):
    """Parser of `trl-miso COMMAND [DATASET] [options]`: the command's own options, and all of a training recipe.

    `add` adds an option of the command's own. Flags need no value: `--bf16` and `--bf16 true` are the same.
    """

    def __init__(self, command: str, usage: str, description: str):
        usage = f"[DATASET] {usage} [--config RECIPE] [options of a recipe]"
        self.actions: list[argparse.Action] = []  # the options of a recipe, then the command's own
        dataclasses = (RecipeArguments, MISOSFTConfig, ModelConfig)
        super().__init__(
            command,
            usage,
            f"{description}\n\n{_DATASET}",
            dataclass_types=dataclasses,
            conflict_handler="resolve",
            add_help=False,
        )
        self.own: list[argparse.Action] = []
        self._group = self.add_argument_group(_OWN)
        self.add("-h", "--help", action=_Help, help="show these lines")
        self.add("--help-all", action=_Help, help="show all options")
        self.add("--config", metavar="RECIPE", help="read options from a YAML file, or a recipe of `trl-miso recipes`")

    def add(self, *names: str, **settings: Any) -> None:
        """Add an option of the command's own, also in place of one of a recipe's."""
        action = self._group.add_argument(*names, **settings)
        self.own.append(action)
        self.actions.append(action)

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Called by transformers for each field: with an alias for some, and flags that need no value."""
        if _is_flag(settings.get("type")):
            settings |= {"nargs": "?", "const": True}
        if alias := _ALIASES.get(names[0]):
            names = (*names, alias)
        action = super().add_argument(*names, **settings)
        self.actions.append(action)
        return action

    def parse(self, arguments: Sequence[str], others: Iterable[str] | None = None, **defaults: Any) -> Parsed:
        """Parse the command line.

        It takes precedence over `--config`, and this over `defaults`.

        Args:
            others: Names of options of another program, which are returned as they are. None: options that are not known are errors.

        Raises:
            ValueError: If a file is missing, a key of a recipe is not known, or the values do not fit.
        """
        arguments = self._with_values(arguments)
        dataset = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
        # On a CPU transformers refuses TRL's default of bf16=True, and torch warns of pinned memory.
        has_accelerator = torch.accelerator.is_available()
        self.set_defaults_with_config(bf16=has_accelerator, dataloader_pin_memory=has_accelerator, **defaults)
        arguments = self._with_config(arguments)
        *parsed, own, unknown = self.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
        recipe, args, model_args = parsed
        if unknown and not unknown[0].startswith("-") and dataset is None:
            dataset = unknown.pop(0)
        if others is None:
            self.refuse(unknown)
        elif strange := [name for name in unknown if name.startswith("--") and name.split("=")[0] not in others]:
            self.refuse(strange, list(others))
        if dataset:
            recipe.dataset_name = dataset
        complete_recipe(recipe, args)
        return Parsed(own, recipe, args, model_args, unknown)

    def _with_values(self, arguments: Sequence[str]) -> list[str]:
        """The arguments, with `=true` behind each flag that has no value: what follows a flag may be the data set."""
        options = {name: action for action in self.actions for name in action.option_strings}
        explicit = []
        for argument, following in pairwise([*arguments, ""]):
            action = options.get(argument)
            if action is not None and _is_flag(action.type) and following.lower() not in _WORDS_OF_FLAGS:
                argument += "=true"
            explicit.append(argument)
        return explicit

    def _with_config(self, arguments: list[str]) -> list[str]:
        """Make the values of the `--config` file defaults, and return the other arguments."""
        finder = CommandParser(self.prog.removeprefix("trl-miso "), "", "", add_help=False)
        finder.add_argument("--config")
        options, arguments = finder.parse_known_args(arguments)
        if options.config is None:
            return arguments
        file = find_file("recipe", options.config)
        values = _read_yaml(file)
        actions = {action.dest: action for action in self.actions}
        for name, value in values.items():
            if name not in actions:
                suggestion = did_you_mean(str(name), list(actions))
                raise ValueError(
                    f"Got the key {name!r} in {file}, which is no option.{suggestion} Fix: correct or remove it."
                )
            if actions[name].nargs == "+" and not isinstance(value, list) and value is not None:
                raise ValueError(f"Got {name}: {value!r} in {file}, expected a list. Fix: write {name}: [{value}].")
            if isinstance(value, dict) and (actions[name].type in (int, float) or _is_flag(actions[name].type)):
                raise ValueError(f"Got {name}: {value!r} in {file}, expected one value. Fix: correct {name}.")
        self.set_defaults_with_config(**values)
        return arguments

    def print_short_help(self) -> None:
        """Print the command's own options, MISO's, and the most used ones of a recipe."""
        own = [action.dest for action in self.own]
        rows = [name for name in RecipeArguments.__dataclass_fields__ if name != "ignore_bias_buffers"]
        groups = {
            "contexts and their mixture": list(MISOSFTConfig.__annotations__),
            "rows": rows,
            "model and training, the most used": list(_MOST_USED),
        }
        fields = {action.dest: action for action in reversed(self.actions) if action.option_strings}
        sections = {_OWN: self.own}
        for title, names in groups.items():
            sections[title] = [fields[name] for name in names if name not in own]
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for title, actions in sections.items():
            formatter.start_section(title)
            formatter.add_arguments([_shortened(action) for action in actions])
            formatter.end_section()
        count = len({action.dest for action in self.actions})
        formatter.add_text(
            f"--help-all lists all {count} options, also TRL's and transformers'. A recipe can set each of them."
        )
        print(formatter.format_help(), end="")


def _is_flag(kind: Any) -> bool:
    """Whether the type of an option of a dataclass is that of bools, which transformers' parser gives a value."""
    return getattr(kind, "__name__", "") == "string_to_bool"


class _Help(argparse.Action):
    """`--help` and `--help-all`."""

    def __init__(self, option_strings: list[str], dest: str, help: str):
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string == "--help-all":
            parser.print_help()
        else:
            parser.print_short_help()
        parser.exit()


def _shortened(action: argparse.Action) -> argparse.Action:
    """The option with the first sentence of its help, and its default."""
    shortened = copy(action)
    sentence = re.split(r"(?<=\w[.])\s(?!\d)", action.help or "")[0]  # "eq. 3" does not end one
    sentence = re.sub(r"(?<![.])[.]$", "", sentence)
    default = action.default
    if default not in (None, False, "", [], argparse.SUPPRESS) and "(default" not in sentence:
        sentence += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
    if action.choices and "'" not in sentence:
        sentence += f": {', '.join(map(str, action.choices))}"
    shortened.help = sentence.replace("%", "%%") if "%(default)s" not in sentence else sentence
    return shortened


def _read_yaml(file: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Sets the environment variables of its key `env`, as TRL does."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"Got {file}{where}, which is no YAML: {problem}. Fix: correct that line.") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"Got {file}, which has no keys, expected lines such as `learning_rate: 5.0e-6`. Fix: add them."
        )
    for name, value in (values.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    return values
