"""The console command `trl-miso`. Commands are imported when they are run: torch and TRL take seconds."""

import sys
from importlib import import_module

from trl_miso.log import show_log
from trl_miso.recipes import did_you_mean, similar_path
from trl_miso.version import __version__

_COMMANDS = {
    "sft": ("trl_miso.cli.sft", "train: a recipe, your own rows and model, or (without arguments) a small example"),
    "recipes": ("trl_miso.cli.recipes", "list the recipes, accelerate configs and chat templates; print one"),
    "decompose": ("trl_miso.cli.decompose", "split instructions into a base and constraints, by rules"),
    "preview": ("trl_miso.cli.preview", "show rows as they will be trained on, and statistics"),
    "verify": ("trl_miso.cli.verify", "check that MISO is exact on a model and its rows, without training"),
    "readout": ("trl_miso.cli.readout", "show how a model reads several contexts, before or after training"),
    "report": ("trl_miso.cli.report", "show how much attention each constraint gets, before and after training"),
    "eval": ("trl_miso.cli.eval", "score responses to a benchmark beside the paper's numbers"),
}
_HELP = "\n".join(
    [
        "usage: trl-miso COMMAND ...",
        "",
        "Mixture-of-Contexts (MISO) fine-tuning for TRL.",
        "",
        *(f"  {name:10} {about}" for name, (_, about) in _COMMANDS.items()),
        "",
        "`trl-miso COMMAND --help` shows a command's own options and the most used ones of training, --help-all all of them.",
    ]
)


def main() -> None:
    """Run a command. Errors in the input are printed in one line, without a traceback."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("", "-h", "--help", "help"):
        print(_HELP)
        raise SystemExit(0)
    if command in ("--version", "version"):
        print(f"trl-miso {__version__}")
        raise SystemExit(0)
    if command not in _COMMANDS:
        suggestion = did_you_mean(command, list(_COMMANDS))
        print(
            f"trl-miso: got command {command!r}, expected one of {', '.join(_COMMANDS)}.{suggestion}", file=sys.stderr
        )
        raise SystemExit(2)
    run(command, sys.argv[2:])


def run(command: str, arguments: list[str]) -> None:
    """Run a command of `_COMMANDS`; `trl_miso.cli.sft` documents the arguments of `sft`, for instance."""
    module, _ = _COMMANDS[command]
    if command != "preview":  # whose page says the same
        show_log()
    try:
        import_module(module).main(arguments)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"trl-miso {command}: {_in_one_line(error)}") from error
    except KeyboardInterrupt as interrupt:
        print("Interrupted.", file=sys.stderr)
        if command == "eval":
            print("The same command continues with the responses that are kept.", file=sys.stderr)
        raise SystemExit(130) from interrupt  # the shells' exit status of Ctrl-C


def _in_one_line(error: Exception) -> str:
    """The message of an error; of errors of other packages, which may be pages long, the first paragraph."""
    if isinstance(error, FileNotFoundError) and error.filename:
        name = str(error.filename)
        return f"Got {name!r}, which does not exist.{similar_path(name)} Fix: correct the path."
    text = str(error).strip() or type(error).__name__
    if text.startswith("Got "):
        return text
    paragraph = text.split("\n\n")[0]
    return " ".join(line.strip() for line in paragraph.splitlines())
