"""The console command `trl-miso`."""

import sys
from importlib import import_module

from yaml import YAMLError

_COMMANDS = {
    "preview": ("trl_miso.cli.preview", "show rows as they will be trained on, and statistics"),
    "verify": ("trl_miso.cli.verify", "check that MISO is exact on a model and its rows, without training"),
    "readout": ("trl_miso.cli.readout", "show how a model reads several contexts, before or after training"),
    "report": ("trl_miso.cli.report", "show how much attention each constraint gets, before and after training"),
    "eval": ("trl_miso.cli.eval", "score responses to a benchmark beside the paper's numbers"),
}
_HELP = "usage: trl-miso COMMAND ...\n\n" + "\n".join(f"  {name:10} {about}" for name, (_, about) in _COMMANDS.items())


def main() -> None:
    """Run a command. Errors in the input are printed in one line, without a traceback."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("", "-h", "--help"):
        print(_HELP)
        raise SystemExit(0)
    if command not in _COMMANDS:
        print(f"Got command {command!r}, expected one of {list(_COMMANDS)}.\n\n{_HELP}")
        raise SystemExit(2)
    module, _ = _COMMANDS[command]
    try:
        import_module(module).main(sys.argv[2:])
    except (ValueError, OSError, ImportError, YAMLError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except KeyboardInterrupt as interrupt:
        print("Interrupted.", file=sys.stderr)
        if command == "eval":
            print("The same command continues with the responses that are kept.", file=sys.stderr)
        raise SystemExit(130) from interrupt  # the shells' exit status of Ctrl-C
