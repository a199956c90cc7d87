"""Fixtures of the tests of evaluation."""

import pytest

from trl_miso.sources.synthetic import build_model


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """A small random Llama and its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("model")
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
