"""Shared by the tests of the studies."""

import logging

import datasets
import pytest
import torch
import transformers


@pytest.fixture(scope="module", autouse=True)
def _restore_logs():
    """A study turns off logs and progress bars of its process: turn them on again."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()
