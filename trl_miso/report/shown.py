"""One row in full: every token of its prompt with its mass in each layer, every token of the answer with where it looked."""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trl_miso.data.token_text import token_texts
from trl_miso.report.measure import Measurement


def shown(measured: Measurement, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Plain data: `prompt` and `answer` texts, `owners` of the prompt's tokens, `layers` (a list of their masses for all layers,
    then for each), and `looks` (for each token of the answer its mass by part)."""
    assert measured.tokens is not None, "measured without details"
    prompted = measured.sample.prompted
    layers = np.nanmean(measured.tokens, 1)[:, : len(prompted.ids)]  # (L, T), heads are alike
    return {
        "prompt": token_texts(prompted.ids, tokenizer),
        "owners": prompted.owners,
        "answer": token_texts(measured.sample.answer, tokenizer),
        "layers": [_short(layer) for layer in (layers.mean(0), *layers)],
        "looks": [_short(token) for token in measured.answer],
    }


def _short(values: np.ndarray) -> list[float]:
    """With three digits that count."""
    return [float(f"{x:.3g}") for x in values]
