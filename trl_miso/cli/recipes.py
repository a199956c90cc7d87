"""`trl-miso recipes`: the files that the package brings, by name."""

from pathlib import Path

from trl_miso.cli.parser import CommandParser
from trl_miso.recipes import SHIPPED, did_you_mean

_ABOUT = """\
List the recipes and what they reproduce, the accelerate configs and the chat templates, or print one, to change a copy of it:

    trl-miso recipes llama3_8b_para > my.yaml
    trl-miso sft --config my.yaml"""
_OPTIONS = {"recipe": "--config", "accelerate config": "--accelerate_config", "chat template": "--chat_template_path"}


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser = CommandParser("recipes", "[NAME]", _ABOUT)
    parser.add_argument("name", nargs="?", metavar="NAME", help="print the file of this name")
    name = parser.parse_args(arguments).name
    if name is None:
        print(_list())
        return
    files = {name: file for files in SHIPPED.values() for name, file in files.items()}
    if name not in files:
        raise ValueError(
            f"Got name {name!r}, expected one of the names that `trl-miso recipes` lists.{did_you_mean(name, list(files))}"
        )
    print(files[name].read_text(encoding="utf-8"), end="")


def _list() -> str:
    lines = []
    for kind, files in SHIPPED.items():
        lines += [
            f"{kind}s ({_OPTIONS[kind]} NAME)",
            *(f"  {name:24} {_about(file)}" for name, file in files.items()),
            "",
        ]
    return "\n".join(lines).rstrip()


def _about(file: Path) -> str:
    """The comment in the first line of a file."""
    first = file.read_text(encoding="utf-8").splitlines()[0]
    return first.strip("{#-} ")
