"""The console command `trl-miso`."""

import sys
from importlib import import_module

from yaml import YAMLError

_COMMANDS = {
    "preview": ("trl_miso.cli.preview", "show rows as they will be trained on, and statistics"),
    "eval": ("trl_miso.cli.eval", "score responses to a benchmark beside the paper's numbers"),
    "report": ("trl_miso.cli.report", "show how much attention each constraint gets, before and after training"),
    "verify": ("trl_miso.cli.verify", "check that MISO is exact on a model and its rows, without training"),
}
_HELP = "usage: trl-miso COMMAND ...\n\n" + "\n".join(f"  {name:10} {about}" for name, (_, about) in _COMMANDS.items())


def main() -> None:
    """Run a command; what is wrong with the input is said in one line, not in a traceback."""
    command, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if command not in _COMMANDS:
        wanted = command in ("", "-h", "--help")
        print(_HELP if wanted else f"Got command {command!r}, expected one of {list(_COMMANDS)}.\n\n{_HELP}")
        raise SystemExit(0 if wanted else 2)
    try:
        import_module(_COMMANDS[command][0]).main(arguments)
    except (ValueError, OSError, YAMLError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except KeyboardInterrupt as interrupt:
        goes_on = " The same command goes on with the responses that are kept." if command == "eval" else ""
        print(f"Interrupted.{goes_on}", file=sys.stderr)
        raise SystemExit(130) from interrupt  # as shells have it for Ctrl-C
