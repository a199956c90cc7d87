"""One row in full: the mass of each prompt token per layer, and for each answer token its attention by part."""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trl_miso.data.token_text import token_texts
from trl_miso.report.measure import Measurement


def row_detail(measured: Measurement, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Plain data of one row that was measured with its tokens (`measure(detailed=...)`).

    Returns:
        `prompt` and `answer`: the texts of their tokens. `owners`: the part of each prompt token. `layers`: lists of the prompt
        tokens' masses, first the mean over layers, then each layer. `looks`: for each answer token its mass by part.
    """
    assert measured.tokens is not None, "measured without details"
    prompted = measured.sample.prompted
    layers = np.nanmean(measured.tokens, 1)[:, : len(prompted.ids)]  # (L, T), mean over heads
    return {
        "prompt": token_texts(prompted.ids, tokenizer),
        "owners": prompted.owners,
        "answer": token_texts(measured.sample.answer, tokenizer),
        "layers": [_rounded(layer) for layer in (layers.mean(0), *layers)],
        "looks": [_rounded(token) for token in measured.answer],
    }


def _rounded(values: np.ndarray) -> list[float]:
    """Rounded to three significant digits."""
    return [float(f"{x:.3g}") for x in values]
