"""Build a report: samples of the rows, measurements of one or two models, plain data, and the files."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_quantization_config

from trl_miso.config import MISOSFTConfig
from trl_miso.data.mapping import naming
from trl_miso.data.options import DataOptions
from trl_miso.data.schema import RowDropped, row_format
from trl_miso.pages.report import render_report
from trl_miso.report.measure import Measurement, generate_answer, measure
from trl_miso.report.plots import draw
from trl_miso.report.row_detail import row_detail
from trl_miso.report.samples import ConstraintCheck, Sample, Sampler
from trl_miso.report.summary import Summary, compare_summaries

# Called with samples and what is done with them; returns the samples, and may show how many were consumed.
Progress = Callable[[Sequence[Sample], str], Iterable[Sample]]


@dataclass
class SampledRows:
    """The samples of the rows that can be measured, and the reasons why others cannot.

    Attributes:
        dataset: Name of the dataset.
        read: Number of rows read.
        samples: Samples of the rows that can be measured.
        skipped: The numbers of all other rows, by reason.
    """

    dataset: str
    read: int
    samples: list[Sample] = field(default_factory=list)
    skipped: dict[str, list[int]] = field(default_factory=dict)

    def skip(self, index: int, reason: RowDropped) -> None:
        self.skipped.setdefault(str(reason), []).append(index)

    def check_measured(self, index: int, samples: Sequence[Sample]) -> None:
        """Check that a row to show is among the samples.

        Raises:
            ValueError: If it is not; the message has the reason.
        """
        if any(sample.index == index for sample in samples):
            return
        reason = f"{self.read} rows were read"
        for skip_reason, indices in self.skipped.items():
            if index in indices:
                reason = skip_reason
                break
        raise ValueError(
            f"Got row {index} to show, which is not measured: {reason}. Expected a measured row. Fix: give another --row."
        )


def make_sampler(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig, own_answers: bool
) -> Sampler:
    """The sampler for the rows of a dataset.

    Raises:
        ValueError: If the rows have neither constraints nor contexts.
    """
    kind = row_format(dataset.column_names, args.dataset_text_field)
    if kind not in ("constraints", "contexts"):
        raise ValueError(
            f"Got rows in the {kind!r} format, expected a constraints or a contexts column: attention is measured per constraint or "
            "context. Fix: add one of these columns (trl_miso.sources has adapters; --source)."
        )
    return Sampler(tokenizer, DataOptions.of(args), kind, own_answers)


def sample_rows(dataset: Dataset, sampler: Sampler, name: str) -> SampledRows:
    """Turn the rows of a dataset into samples.

    Raises:
        ValueError: If no row can be measured.
    """
    rows = SampledRows(name, len(dataset))
    for index, row in enumerate(dataset):
        with naming(index):
            try:
                rows.samples.append(sampler(row, index))
            except RowDropped as reason:
                rows.skip(index, reason)
    if not rows.samples:
        raise ValueError(
            f"Got {rows.read} rows, none of which can be measured ({'; '.join(rows.skipped)}), expected at least one that can. Fix: "
            "correct the rows, or raise --num_rows or --max_length."
        )
    return rows


def with_placeholder_answer(row: dict[str, Any]) -> dict[str, Any]:
    """A completion for a row without one, which the model's own answer will replace."""
    if isinstance(row["prompt"], list):
        return {"completion": [{"role": "assistant", "content": "."}]}
    return {"completion": "."}


def load_chat_template(path: str) -> str:
    """The chat template of a .jinja or .j2 file, or of a model, as `chat_template_path` names it."""
    if path.endswith((".jinja", ".j2")):
        return Path(path).read_text(encoding="utf-8")
    return AutoTokenizer.from_pretrained(path).chat_template


def check_same_prompts(tokenizer: PreTrainedTokenizerBase, names: Sequence[str], template: str | None) -> None:
    """Check that all models read the same prompts as the same tokens.

    Args:
        tokenizer: That of the first model.
        names: The models.
        template: `chat_template_path`, which replaces the models' own chat templates.

    Raises:
        ValueError: If the tokenizers or the chat templates differ.
    """
    for name in names[1:]:
        other = AutoTokenizer.from_pretrained(name)
        if tokenizer.get_vocab() != other.get_vocab():
            raise ValueError(
                f"Got {list(names)} with tokenizers that differ, expected the same tokens. Fix: compare a model with the model that it "
                "was trained from."
            )
        if not template and tokenizer.chat_template != other.chat_template:
            raise ValueError(
                f"Got {list(names)} with chat templates that differ, expected the same prompts for both. Fix: give "
                "--chat_template_path, the template of the training."
            )


def load_model(name: str, args: MISOSFTConfig, model_args: ModelConfig) -> PreTrainedModel:
    """Load a model with the recipe's options, on the accelerator if there is one.

    `model_revision` holds for the model that `model_args` names.
    """
    quantization = get_quantization_config(model_args)
    options = {
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": args.trust_remote_code,
    }
    if name == model_args.model_name_or_path:
        options["revision"] = model_args.model_revision
    if quantization:
        options["quantization_config"] = quantization
    model = AutoModelForCausalLM.from_pretrained(name, **options | (args.model_init_kwargs or {}))
    if quantization or args.use_cpu or not torch.accelerator.is_available():
        return model
    return model.to(torch.accelerator.current_accelerator())


def build_report(
    names: Sequence[str],
    load: Callable[[str], PreTrainedModel],
    sampler: Sampler,
    rows: SampledRows,
    check: ConstraintCheck,
    *,
    weighting: str = "uniform",
    row: int | None = None,
    max_new_tokens: int = 512,
    progress: Progress = lambda samples, doing: samples,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Measure one or two models on the same rows, one model in memory at a time.

    Args:
        names: The models, the one before training first.
        load: Loads a model by its name.
        sampler: Made `rows`; with `own_answers` each model answers for itself.
        rows: The samples; rows whose generated answer is too long are added to those skipped.
        check: Checks the constraints.
        weighting: The weighting of the contexts.
        row: The row to show token by token; by default the first that is measured.
        max_new_tokens: Limit of a generated answer, in tokens.
        progress: Wraps the samples while they are measured or answered.

    Returns:
        The report as plain data, and arrays by name: `model_{i}/row_{index}` (L, H, P), and of the shown row
        `model_{i}/answer` (L, H, U, P) and `model_{i}/tokens` (L, H, T).

    Raises:
        ValueError: If the row to show is not measured, or MISO does not support a model.
    """
    shown_row = rows.samples[0].index if row is None else row
    rows.check_measured(shown_row, rows.samples)
    summaries: list[Summary] = []
    details: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for i, (name, label) in enumerate(zip(names, model_labels(names), strict=True)):
        model, samples = load(name), rows.samples
        if sampler.own_answers:
            samples = _generate_answers(model, sampler, rows, max_new_tokens, progress)
        rows.check_measured(shown_row, samples)
        summary = Summary(label)
        for measured in measure(
            model,
            progress(samples, f"Measuring {label}"),
            weighting=weighting,
            output_positions=sampler.options.output_positions,
            max_length=sampler.options.max_length,
            detailed=shown_row,
        ):
            summary.add(measured, measured.sample.followed(check))
            if measured.sample.index == shown_row:
                details.append(row_detail(measured, sampler.tokenizer))
                arrays |= _arrays_of_row(f"model_{i}", measured)
        arrays |= {f"model_{i}/row_{index}": mass for index, mass in summary.by_row.items()}
        summaries.append(summary)
        del model
    return _report_data(rows, sampler, summaries, shown_row, details), arrays


def model_labels(names: Sequence[str]) -> list[str]:
    """The ends of the models' paths, with as many folders as make them differ."""
    parts = [Path(name).parts for name in names]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(names):
            return labels
    return list(names)


def write_report(report: dict[str, Any], arrays: dict[str, np.ndarray], folder: Path, page: Path) -> None:
    """Write `report.json`, `masses.npz` and the figures to a folder that exists, and the page."""
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    np.savez_compressed(folder / "masses.npz", **arrays)  # type: ignore[arg-type]
    figures = draw(report, folder)
    page.write_text(render_report(report, figures, folder), encoding="utf-8")


def _generate_answers(
    model: PreTrainedModel, sampler: Sampler, rows: SampledRows, max_new_tokens: int, progress: Progress
) -> list[Sample]:
    """The samples with the model's own answers, without those that become too long."""
    samples = []
    for sample in progress(rows.samples, "Answering"):
        try:
            answered = generate_answer(model, sampler.tokenizer, sample, max_new_tokens)
            samples.append(sampler.check_length(answered))
        except RowDropped as reason:
            rows.skip(sample.index, reason)
    return samples


def _arrays_of_row(prefix: str, measured: Measurement) -> dict[str, np.ndarray]:
    assert measured.each is not None and measured.tokens is not None, "measured without details"
    return {f"{prefix}/answer": measured.each, f"{prefix}/tokens": measured.tokens}


def _report_data(
    rows: SampledRows, sampler: Sampler, summaries: list[Summary], shown_row: int, details: list[dict[str, Any]]
) -> dict[str, Any]:
    models = [summary.report() for summary in summaries]
    parts = next(row["parts"] for row in models[0]["rows"] if row["row"] == shown_row)
    skipped = {}
    for reason, indices in rows.skipped.items():
        skipped[reason] = {"rows": len(set(indices)), "first_row": min(indices)}
    measured = len(models[0]["rows"])
    return {
        "rows": {"dataset": rows.dataset, "read": rows.read, "measured": measured, "skipped": skipped},
        "answers": "generated" if sampler.own_answers else "given",
        "models": models,
        "compared": compare_summaries(*summaries) if len(summaries) > 1 else None,
        "shown": {
            "row": shown_row,
            "parts": [{"kind": part["kind"], "text": part["text"]} for part in parts],
            "models": details,
        },
    }
