"""Processes that are forked from a server with all imports: starting Python, torch, TRL and this package takes ten seconds.

`run_python` takes the place of `python` for scripts and modules, except where imports are what is tested: each example script runs at
least once in a new interpreter.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.support.preload"])


def run_python(*command: object, cwd: Path = REPOSITORY, timeout: int = 300, **environment: str) -> tuple[str, str]:
    """Run `python *command` in `cwd`, where the command is a script or `-m module`; return stdout and stderr.

    Fails unless the exit status is 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = PROCESSES.Process(
            target=_run, args=([str(part) for part in command], cwd, files, os.environ | environment)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)  # with its ranks
            process.join()
        out, err = (file.read_text() if file.exists() else "" for file in files)
    assert process.exitcode == 0, f"exit status {process.exitcode}\n{out[-4000:]}{err[-8000:]}"
    return out, err


def _run(command: list[str], cwd: Path, files: list[Path], environment: dict[str, str]) -> None:
    os.setsid()
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path.insert(0, str(cwd))
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
