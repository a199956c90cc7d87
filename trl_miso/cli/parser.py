"""argparse for all commands: errors in one line with a suggestion, and help in the order in which it is needed."""

import argparse
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from trl_miso.recipes import did_you_mean

_CHOICE = re.compile(r"argument \S+: invalid choice: '?(?P<value>[^' ]*)'? \(choose from (?P<choices>.*)\)")


class CommandParser(argparse.ArgumentParser):
    """A parser of `trl-miso COMMAND`.

    Args:
        command: The command's name.
        usage: What follows the name.
        description: Printed as it is written.
    """

    def __init__(self, command: str, usage: str, description: str, **options: Any):
        super().__init__(
            prog=f"trl-miso {command}",
            usage=f"trl-miso {command} {usage}",
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        self.refuse(unknown)
        return options

    def refuse(self, arguments: Sequence[str], names: Sequence[str] = ()) -> None:
        """Exit with an error if there are arguments that no option takes.

        Args:
            names: Names of options beside the parser's own, for the suggestion.
        """
        if not arguments:
            return
        unknown = arguments[0].split("=")[0]
        if not unknown.startswith("-"):
            self.error(f"got {unknown!r}, which no option takes.")
        known = re.findall(r"--[\w-]+", self.format_help())
        suggestion = did_you_mean(unknown, [*known, *names])
        self.error(f"unknown option {unknown}.{suggestion} --help lists the options.")

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^(argument --\w+)(/--[\w-]+)+", r"\1", message)  # the same name with hyphens
        if match := _CHOICE.search(message):
            choices = [choice.strip("'") for choice in match["choices"].split(", ")]
            message += f".{did_you_mean(match['value'], choices)}"
        self.exit(2, f"{self.prog}: {message}\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Each option once, though argparse has it with hyphens too, and no placeholder for flags."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=min(120, shutil.get_terminal_size().columns) - 2)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "-" not in name[2:]] or action.option_strings
        if action.nargs == 0:
            return ", ".join(names)
        if action.const is True:
            return ", ".join([*names, f"--no_{action.dest}"] if action.default is True else names)
        if isinstance(action.metavar, tuple):
            return f"{', '.join(names)} {' '.join(action.metavar)}"
        value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
        value = value or {int: "N", float: "X"}.get(action.type, "VALUE")  # type: ignore[call-overload]
        return f"{', '.join(names)} {f'{value} [{value} ...]' if action.nargs == '+' else value}"


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
