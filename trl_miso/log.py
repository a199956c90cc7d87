"""The package's log lines are seen by default: what rows became, which kernel runs, what was verified."""

import logging
import os

from tqdm import tqdm

_PACKAGE = logging.getLogger("trl_miso")


class _Formatter(logging.Formatter):
    """The message alone. accelerate's loggers put `[RANK 0]` before each, though only the main process logs."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).removeprefix("[RANK 0] ")


class _Handler(logging.StreamHandler):
    """Writes to stderr, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:
            self.handleError(record)


def show_log() -> None:
    """Print the package's log lines, level INFO and above, to stderr, unless the user has configured logging.

    On other processes than the main one only warnings are printed. A level that was set for the logger `trl_miso` is kept, and a handler that receives its lines already gets them alone. To silence:
    `logging.getLogger("trl_miso").setLevel(logging.WARNING)`.
    """
    if _PACKAGE.level == logging.NOTSET:
        _PACKAGE.setLevel(logging.INFO)
    if not _PACKAGE.hasHandlers():
        handler = _Handler()
        handler.setFormatter(_Formatter("%(message)s"))
        if os.environ.get("RANK", "0") != "0":
            handler.setLevel(logging.WARNING)
        _PACKAGE.addHandler(handler)
