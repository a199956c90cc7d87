"""`trl-miso report`."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_quantization_config

from trl_miso.cli.arguments import command_parser, count_from, parse_command
from trl_miso.cli.report_terminal import print_report
from trl_miso.config import MISOSFTConfig
from trl_miso.data.contexts import RowDropped, row_format
from trl_miso.data.mapping import naming
from trl_miso.pages.report import render_page
from trl_miso.recipe import RecipeArguments, adapt_rows, first_rows, is_chat, load_rows, load_tokenizer
from trl_miso.report.checks import ifeval_check, synthetic_check
from trl_miso.report.measure import answer_by_itself, measure
from trl_miso.report.meters import SCORES
from trl_miso.report.plots import draw, require_matplotlib
from trl_miso.report.samples import Sample, Sampler
from trl_miso.report.shown import shown
from trl_miso.report.summary import Summary, compared

_USAGE = (
    "trl-miso report [DATASET] --model DIR_OR_ID [--compare DIR_OR_ID] [--num_rows N] [--row N] [--generate] "
    "[--output_dir DIR] [--config RECIPE.yaml] [options of a recipe]"
)
_ABOUT = f"""\
Measure on multi-constraint rows how much attention a model's answers give to each constraint, to the base instruction and to the
output itself, whether the constraints are followed, and what several contexts do to the output's share; for two models
(before and after training) side by side. Writes report.html, report.json, masses.npz and PNG figures to --output_dir.

Answers are the rows' own, or with --generate each model's (greedy, standard inference). Constraints are checked where the rows
have IFEval's instruction_id_list and kwargs (pip install 'trl-miso[eval]'); others are not guessed.

DATASET is an id on the Hub, a folder, or a .jsonl, .json, .csv or .parquet file; without one, generated rows. Every option of
examples/train_crab.py is one here (--context_weighting, --max_length, --dtype, --source, ...). Rows go through the model one
by one; beside its forward pass that takes two arrays of {4 * SCORES // 1_000_000} MB (or one token's scores): no attention matrix is kept."""


@dataclass
class _Rows:
    """Samples of the rows that can be measured, and why the others cannot."""

    read: int = 0
    samples: list[Sample] = field(default_factory=list)
    skipped: dict[str, list[int]] = field(default_factory=dict)

    def skip(self, index: int, reason: RowDropped) -> None:
        self.skipped.setdefault(str(reason), []).append(index)


def main(arguments: list[str]) -> None:
    """Run the command with its arguments."""
    options, (recipe, args, model_args) = parse_command(_parser(), arguments)
    require_matplotlib()
    names = [name for name in (options.model or model_args.model_name_or_path, options.compare) if name]
    if options.compare in names[:-1] or not names or len(names) == 1 and options.compare:
        raise ValueError(
            f"Got {names} as models, expected --model, and another one to --compare it with if any. Fix: give --model a "
            "folder or an id on the Hub."
        )
    if options.max_new_tokens and not options.generate:
        raise ValueError("Got --max_new_tokens without --generate, expected both or neither. Fix: add --generate.")
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model_args.model_name_or_path = names[0]
    dataset, tokenizer, sampler = _prepare(recipe, args, model_args, names, options)
    rows = _sample(dataset, sampler)
    row = _chosen(rows, options.row)
    check = synthetic_check if recipe.dataset_name is None else ifeval_check()
    summaries: list[Summary] = []
    details: list[dict[str, Any]] = []
    arrays: dict[str, Any] = {}
    for at, (name, label) in enumerate(zip(names, _labels(names), strict=True)):
        summary = Summary(label)
        model = _load(name, args, model_args)
        samples = _answered(model, tokenizer, sampler, rows, options) if options.generate else rows.samples
        if row not in [sample.index for sample in samples]:
            raise _not_measured(rows, row)
        for measured in measure(
            model,
            track(samples, f"Measuring {label}", console=Console(stderr=True)),
            weighting=args.context_weighting,
            output_positions=args.output_positions,
            max_length=args.max_length,
            detailed=row,
        ):
            summary.add(measured, measured.sample.followed(check))
            if measured.tokens is not None:
                details.append(shown(measured, tokenizer))
                arrays |= {f"model_{at}/answer": measured.each, f"model_{at}/tokens": measured.tokens}
        arrays |= {f"model_{at}/row_{index}": mass for index, mass in summary.by_row.items()}
        summaries.append(summary)
        del model
    report = _report(recipe, rows, summaries, details, row, options.generate)
    _write(report, arrays, folder)
    print_report(report, Console())
    Console().print(f"Wrote {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(_USAGE, _ABOUT)
    parser.add_argument("--model", metavar="DIR_OR_ID", help="the model, or the one before training")
    parser.add_argument("--compare", metavar="DIR_OR_ID", help="the one after it")
    parser.add_argument("--num_rows", type=count_from(1), default=32, metavar="N", help="rows to read (default: 32)")
    parser.add_argument(
        "--row", type=count_from(0), metavar="N", help="row to show token by token (default: the first)"
    )
    parser.add_argument("--generate", action="store_true", help="measure each model's own answers, not the rows'")
    parser.add_argument("--max_new_tokens", type=count_from(1), metavar="N", help="of an answer (default: 512)")
    parser.add_argument("--output_dir", default="miso-report", metavar="DIR", help="default: miso-report")
    return parser


def _labels(names: list[str]) -> list[str]:
    """The ends of the models' names, as long as it takes to tell them apart."""
    parts = [Path(name).parts for name in names]
    ends = (["/".join(part[-depth:]) for part in parts] for depth in range(1, max(map(len, parts)) + 1))
    return next((labels for labels in ends if len(set(labels)) == len(names)), names)


def _prepare(
    recipe: RecipeArguments, args: MISOSFTConfig, model_args: ModelConfig, names: list[str], options: argparse.Namespace
) -> tuple[Dataset, PreTrainedTokenizerBase, Sampler]:
    """The rows to read, the models' tokenizer, and what makes samples of them."""
    dataset, _ = first_rows(load_rows(recipe, recipe.dataset_train_split), options.num_rows)
    tokenizer = load_tokenizer(dataset, args, model_args)
    if path := args.chat_template_path:
        written = path.endswith((".jinja", ".j2"))
        template = (
            Path(path).read_text(encoding="utf-8") if written else AutoTokenizer.from_pretrained(path).chat_template
        )
        tokenizer.chat_template = template
    for other in names[1:]:
        _check_same(tokenizer, AutoTokenizer.from_pretrained(other), names, args.chat_template_path)
    if options.generate and "prompt" in dataset.column_names and "completion" not in dataset.column_names:
        dataset = dataset.map(_with_completion)
    dataset = adapt_rows(dataset, recipe, is_chat(tokenizer, args))
    kind = row_format(dataset.column_names, args.dataset_text_field)
    if kind not in ("constraints", "contexts"):
        raise ValueError(
            f"Got rows in the {kind!r} format, expected a constraints or a contexts column, whose attention can be told apart. Fix: add "
            "one (trl_miso.sources has adapters; --source)."
        )
    return dataset, tokenizer, Sampler(tokenizer, args, kind, options.generate)


def _with_completion(row: dict[str, Any]) -> dict[str, Any]:
    """A row of prompts alone, with an answer whose place the model's own will take."""
    chat = isinstance(row["prompt"], list)
    return {"completion": [{"role": "assistant", "content": "."}] if chat else "."}


def _check_same(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, names: list[str], template: str | None
) -> None:
    if tokenizer.get_vocab() != other.get_vocab():
        raise ValueError(
            f"Got {names} with tokenizers that differ, expected the same tokens. Fix: compare a model with what it was trained from."
        )
    if not template and tokenizer.chat_template != other.chat_template:
        raise ValueError(
            f"Got {names} with chat templates that differ, expected the same prompts for both. Fix: give --chat_template_path, the one of "
            "training."
        )


def _sample(dataset: Dataset, sampler: Sampler) -> _Rows:
    rows = _Rows(len(dataset))
    for index, row in enumerate(dataset):
        with naming(index):
            try:
                rows.samples.append(sampler(row, index))
            except RowDropped as reason:
                rows.skip(index, reason)
    if not rows.samples:
        raise ValueError(
            f"Got {rows.read} rows of which none can be measured ({'; '.join(rows.skipped)}), expected some. Fix: correct the rows, or "
            "raise --num_rows or --max_length."
        )
    return rows


def _chosen(rows: _Rows, row: int | None) -> int:
    if row is None:
        return rows.samples[0].index
    if row not in [sample.index for sample in rows.samples]:
        raise _not_measured(rows, row)
    return row


def _not_measured(rows: _Rows, row: int) -> ValueError:
    reason = next((reason for reason, indices in rows.skipped.items() if row in indices), f"{rows.read} rows were read")
    return ValueError(
        f"Got row {row} to show, which is not measured: {reason}. Expected one that is. Fix: give another --row."
    )


def _load(name: str, args: MISOSFTConfig, model_args: ModelConfig) -> PreTrainedModel:
    """On the accelerator if there is one, in `--dtype`."""
    quantization = get_quantization_config(model_args)
    options = {
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": args.trust_remote_code,
        **({"revision": model_args.model_revision} if name == model_args.model_name_or_path else {}),
        **({"quantization_config": quantization} if quantization else {}),
        **(args.model_init_kwargs or {}),
    }
    model = AutoModelForCausalLM.from_pretrained(name, **options)
    if quantization or args.use_cpu or not torch.accelerator.is_available():
        return model
    return model.to(torch.accelerator.current_accelerator())


def _answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    rows: _Rows,
    options: argparse.Namespace,
) -> list[Sample]:
    """The samples with the model's own answers, as far as they fit."""
    samples = []
    for sample in track(rows.samples, "Answering", console=Console(stderr=True)):
        try:
            answered = answer_by_itself(model, tokenizer, sample, options.max_new_tokens or 512)
            samples.append(sampler.fitting(answered))
        except RowDropped as reason:
            rows.skip(sample.index, reason)
    return samples


def _report(
    recipe: RecipeArguments,
    rows: _Rows,
    summaries: list[Summary],
    details: list[dict[str, Any]],
    row: int,
    generated: bool,
) -> dict[str, Any]:
    models = [summary.report() for summary in summaries]
    parts = next(r["parts"] for r in models[0]["rows"] if r["row"] == row)
    skipped = {reason: {"rows": len(set(which)), "first_row": min(which)} for reason, which in rows.skipped.items()}
    dataset = recipe.dataset_name or "generated rows"
    return {
        "rows": {"dataset": dataset, "read": rows.read, "measured": len(models[0]["rows"]), "skipped": skipped},
        "answers": "generated" if generated else "given",
        "models": models,
        "compared": compared(*summaries) if len(summaries) > 1 else None,
        "shown": {"row": row, "parts": [{"kind": p["kind"], "text": p["text"]} for p in parts], "models": details},
    }


def _write(report: dict[str, Any], arrays: dict[str, Any], folder: Path) -> None:
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    np.savez_compressed(folder / "masses.npz", **arrays)
    figures = draw(report, folder)
    (folder / "report.html").write_text(render_page(report, figures, folder), encoding="utf-8")
