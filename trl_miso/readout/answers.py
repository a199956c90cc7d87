"""Answers that the model writes itself, greedily: by standard inference and under each weighting, and the constraints they follow."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_miso.attention.state import restore_attention
from trl_miso.data.schema import template_kwargs
from trl_miso.evaluation.greedy import greedy_responses
from trl_miso.generation import miso_generate
from trl_miso.readout.losses import READINGS, STANDARD, Reading, full_weight_obstacle
from trl_miso.readout.rows import PreparedRow, Progress
from trl_miso.report.samples import ConstraintCheck, prompt_ids


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PreparedRow],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    output_positions: str = "successive",
    response_template: str | None = None,
    progress: Progress = lambda items, doing: items,
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Answer each row greedily: from its full context by `generate`, and from its contexts by `miso_generate` under each weighting.

    Args:
        max_new_tokens: Limit of an answer, in tokens.
        batch_size: Rows per batch.
        output_positions, response_template: As in `MISOSFTConfig`.
        progress: Wraps the batches of each reading.

    Returns:
        By reading (`"standard"` first) the text of one answer per row, and by reading that is impossible the reason.

    Raises:
        ValueError: If MISO does not support the model; as `miso_generate`.
    """
    batches = _batches(rows, batch_size)
    refused: dict[str, str] = {}
    obstacle = full_weight_obstacle(rows)
    if obstacle:
        refused = {reading.name: obstacle for reading in READINGS if reading.full_context_weight is not None}
    answers: dict[str, list[str]] = {}
    with restore_attention(model):
        model.eval()
        answers[STANDARD] = [""] * len(rows)
        for places in progress(batches, f"Answering: {STANDARD}"):
            prompts = [prompt_ids(tokenizer, rows[i].full.contexts[0], template_kwargs(rows[i].row)) for i in places]
            responses = greedy_responses(model, tokenizer, prompts, max_new_tokens)
            _keep(tokenizer, answers[STANDARD], places, responses)
    generation = {
        "output_positions": output_positions,
        "response_template": response_template,
        "max_new_tokens": max_new_tokens,
    }
    for reading in READINGS:
        if reading.name in refused:
            continue
        texts = [""] * len(rows)
        try:
            for places in progress(batches, f"Answering: {reading.name}"):
                members = [rows[i] for i in places]
                _keep(tokenizer, texts, places, _mixed_responses(model, tokenizer, members, reading, generation))
        except ValueError as error:
            if reading.weighting != "vanilla":
                raise
            refused[reading.name] = str(error)  # the other weightings could answer: a window is in the way
            continue
        answers[reading.name] = texts
    return answers, refused


def verdicts_on(check: ConstraintCheck, row: dict[str, Any], answer: str) -> list[bool]:
    """The verdicts on an answer, one per constraint. `row` passed `sample_rows` with this check."""
    verdicts = check(row, answer)
    assert verdicts is not None, "the row has a check"
    return [bool(verdict) for verdict in verdicts]


def _batches(rows: Sequence[PreparedRow], size: int) -> list[list[int]]:
    """The places of rows in batches: the longest rows first, and in a batch rows with the same arguments of the chat template."""
    by_kwargs: dict[str, list[int]] = {}
    for place in sorted(range(len(rows)), key=lambda i: -rows[i].example.longest):
        by_kwargs.setdefault(repr(template_kwargs(rows[place].row)), []).append(place)
    return [places[i : i + size] for places in by_kwargs.values() for i in range(0, len(places), size)]


def _mixed_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PreparedRow],
    reading: Reading,
    generation: dict[str, Any],
) -> list[list[int]]:
    """One response per row, all rows in one batch."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    weights: Any = [reading.weights(row) for row in rows] if reading.weighting == "uniform" else None
    stops = {"tokenizer": tokenizer} if model.generation_config.stop_strings else {}
    contexts: Any = [row.parallel.contexts for row in rows]
    responses = miso_generate(
        model,
        tokenizer,
        contexts,
        weighting=reading.weighting,
        weights=weights,
        chat_template_kwargs=template_kwargs(rows[0].row),
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        **generation,
        **stops,
    )
    return responses.tolist()


def _keep(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], places: Sequence[int], responses: Sequence[Sequence[int]]
) -> None:
    decoded = tokenizer.batch_decode(responses, skip_special_tokens=True)
    for place, text in zip(places, decoded, strict=True):
        texts[place] = text
