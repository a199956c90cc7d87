"""Worker processes of the studies: one thread, silent, ended with their parent."""

import logging
import multiprocessing
import os
import threading
import warnings

import datasets
import torch
import transformers


def start_worker() -> None:
    """Set up a process: one thread, no log output, end with the parent process.

    With one thread, results do not depend on the number of processes. Small models run fastest so, too.
    """
    torch.set_num_threads(1)
    silence()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def silence() -> None:
    """Turn off logs, warnings and progress bars: hundreds of runs would print the same."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
