"""
Which architectures can be trained with MISO: compare each with one-row-per-context execution.

    python -m benchmarks.supported_models                           # writes benchmarks/results/MODELS.md
    python -m benchmarks.supported_models --new                     # adds the architectures that MODELS.md lacks
    python -m benchmarks.supported_models --only llama gemma2 bloom # prints the lines of these

Each of transformers' language models for text is built tiny, with random weights and the head proportions of its default config, and
given to MISOSFTTrainer with default settings. It is equal if the trainer's loss and every parameter's gradient equal those of
one-row-per-context execution in every form: para with shared and with unshared prefixes, succ, and rows of one context, and if a step
of training runs. Otherwise it has to be refused before training, with a reason. Anything else is a bug and is shown as one ("NOT EQUAL",
"WRONG LOSS", "FAILS").
"""

import argparse
import logging
import math
import os
import re
import tempfile
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from rich.console import Console
from rich.progress import track
from transformers import PrinterCallback
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.models import architectures, random_model, shrunk
from tests.support.rows_oracle import parts_of, positions_of, rows_loss
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.attention.kernels import KernelOptions, TorchFlash
from trl_miso.attention.support import check_config, head_dim
from trl_miso.segments import encode, parallel, single, successive
from trl_miso.sources.synthetic import build_tokenizer, synthetic_rows
from trl_miso.training import guards

TABLE = Path(__file__).parent / "results" / "MODELS.md"
COMMAND = "python -m benchmarks.supported_models"
# Norms and rotations are computed in float32 even in float64 models.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
MAX_LENGTH = 64
CONTEXTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8], [5, 6, 20, 21, 22], [5, 6]]
OUTPUTS = [[2, 60, 61, 62], [2, 63, 64, 65, 66]]
ORDER = ("NOT", "WRONG", "FAILS", "equal", "refused", "not")
HEADER = """\
# Which architectures can be trained with MISO

Made by `{command}`, and with `--new` for what a later version adds
({versions}): {counts}.

Each language model for text in transformers is built tiny, with random weights, and given to `MISOSFTTrainer` with default settings.
*Since* is the version of transformers that added it, 5.23 for all that are older. Each was examined with this version or a later one.
{added}

- **equal**: the trainer's loss and the gradient of every parameter equal those of one-row-per-context execution, for para (with
  and without shared prefixes), succ and rows of one context; and a step of training runs. *Worst error* is the largest of all relative errors.
- **equal with** a setting: the default is refused, with an error that names the setting.
- **refused**: an error, for the reason given, when the trainer is built or by the checks before its first step.
- **not tried**: no tiny model of the architecture could be built and run.

Tiny models have the layer kinds of the architecture's default config, and its head proportions: query heads to key-value heads, and in latent
attention the rotated and the other part of a key to each other and to the size of a value. A checkpoint with another config is checked when it
is trained.

## Mixture of experts

The loss above is that of the answers. Where a config has `output_router_logits` and a `router_aux_loss_coef` other than 0, SFTTrainer adds
a load-balancing loss by default (the notes below name the coefficient), computed from the tokens of the batch:

- With shared prefixes every token of a common prefix counts once, not once per context, and so does the answer: the experts are balanced over
  the tokens that are computed. With `share_prefixes=False` a prefix counts once per context. So this loss, and only this loss, depends on
  `share_prefixes`, and is not that of one-row-per-context execution, where the answer too would count once per context.
- A row with several contexts has more tokens than plain SFT, so the same rows weigh instructions more in this loss.
- `router_aux_loss_coef=0` turns the loss off. Configs without `num_experts` need this setting, since SFTTrainer reads that attribute.

## Architectures

{table}
"""


# Settings that an error may ask for, as its fix.
FIXES: dict[str, dict[str, Any]] = {
    "output_positions='after_longest'": {"output_positions": "after_longest"},
    "router_aux_loss_coef=0": {"router_aux_loss_coef": 0.0},
    "gradient_checkpointing=False": {"gradient_checkpointing": False},
}


class Finding(NamedTuple):
    """Verdict on one architecture.

    `error`: the worst relative error of the loss and of all parameters' gradients. `since`: see the table's header.
    """

    model_type: str
    verdict: str
    error: float | None
    note: str
    since: str = ".".join(transformers.__version__.split(".")[:2])


def rows(mode: str, positions: str) -> list[dict[str, list[int]]]:
    """Two prepared rows: the first laid out in `mode`, the second with one context."""
    tokens, example = CONTEXTS[1], single(len(CONTEXTS[1]) + len(OUTPUTS[0]))
    if mode == "para":
        tokens, example = parallel(CONTEXTS, len(OUTPUTS[0]), [0.4, 0.3, 0.2, 0.1], positions)
    elif mode == "succ":
        tokens, example = list(range(10, 21)), successive([4, 4, 3], len(OUTPUTS[0]))
    second = CONTEXTS[2], OUTPUTS[1], single(len(CONTEXTS[2]) + len(OUTPUTS[1]))
    return [
        {
            "input_ids": context + output,
            "labels": [-100] * (len(context) + 1) + output[1:],
            "miso_layout": encode(example),
        }
        for context, output, example in ((tokens, OUTPUTS[0], example), second)
    ]


def make_trainer(model: Any, tokenizer: Any, folder: str, **options: Any) -> MISOSFTTrainer:
    """A trainer with default settings, but for the length of rows, the precision and what a CPU and a step need."""
    defaults = {"max_length": MAX_LENGTH, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    defaults |= {"max_steps": 1, "save_strategy": "no"}
    dataset = Dataset.from_list(rows("para", options.get("output_positions", "successive")))
    args = MISOSFTConfig(folder, **defaults | options)
    trainer = MISOSFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def nearly_default_trainer(
    model_type: str, dtype: torch.dtype, tokenizer: Any, folder: str
) -> tuple[MISOSFTTrainer, dict[str, Any]]:
    """A trainer with the settings that errors ask for, and these settings."""
    options: dict[str, Any] = {}
    while True:
        try:
            return make_trainer(make_model(model_type, dtype), tokenizer, folder, **options), options
        except ValueError as error:
            _, _, asked = str(error).partition("Fix: ")
            fix = next((fix for setting, fix in FIXES.items() if setting in asked), {})
            if fix.items() <= options.items():
                raise
            options |= fix


def make_model(model_type: str, dtype: torch.dtype, **overrides: Any) -> Any:
    """A tiny model that looks trained: noise on all one-dimensional parameters, so that no bias is 0 and no norm weight 1."""
    model = random_model(shrunk(model_type, **overrides), dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def worst_error(trainer: MISOSFTTrainer, mode: str, positions: str, share: bool) -> tuple[float, float]:
    """Relative errors of the trainer against one row per context.

    Returns:
        The worst of the loss and of every parameter's gradient, and the error of the loss that the trainer computes without
        logits, less the load-balancing loss. A gradient's error is relative to its largest entry, or to a thousandth of the
        model's largest where the gradient is zero up to rounding.
    """
    model, prepared = trainer.model, rows(mode, positions)
    ours = model.config.get_text_config()._attn_implementation
    trainer.data_collator.share_prefixes = share
    batch = trainer.data_collator(prepared)
    labels = batch["labels"][0, 1:]
    count, trained = int((labels != -100).sum()), math.inf
    with torch.no_grad(), suppress(RuntimeError):
        trained = trainer.compute_loss(model, dict(batch)).item()
    del batch["labels"]
    out = model(**batch, use_cache=False)
    got = torch.nn.functional.cross_entropy(out.logits[0, :-1].double(), labels, ignore_index=-100)
    if getattr(out, "aux_loss", None) is not None:
        trained -= trainer.router_aux_loss_coef * float(out.aux_loss)
    got_gradients = gradients(model, got)
    expected = torch.zeros((), dtype=torch.float64)
    for row in prepared:
        for contexts, output, own, weights in parts_of(row):
            kind = "chunks" if mode == "succ" and len(contexts) > 1 else positions
            ids = positions_of(contexts, output, kind)
            expected = expected + rows_loss(model, contexts, output, own, weights, positions=ids) / count
    expected_gradients = gradients(model, expected)
    model.set_attn_implementation(ours)
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    errors = [abs(got.item() - expected.item()) / expected.item()]
    for name, gradient in expected_gradients.items():
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        errors.append(float((got_gradients[name] - gradient).abs().max()) / scale)
    return max(errors, key=lambda error: (math.isnan(error), error)), abs(trained - got.item()) / got.item()


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


def examine(model_type: str, tokenizer: Any, folder: str) -> Finding:
    """The verdict on an architecture."""
    failure = None
    for dtype in TOLERANCE:  # some mixture-of-experts layers have no float64
        try:
            make_model(model_type, dtype)(input_ids=torch.tensor([CONTEXTS[0]]))
            failure = None
            break
        except Exception as error:
            failure = error
    try:
        trainer, options = nearly_default_trainer(model_type, dtype, tokenizer, folder)
    except Exception as error:
        if isinstance(error, ValueError) and re.search("Got .*xpected.*Fix", str(error), re.DOTALL):
            return Finding(model_type, "refused", None, shortened(error))
        if failure is None:
            return Finding(model_type, "FAILS", None, shortened(error))
    if failure is not None:  # the model fails without MISO too
        return Finding(model_type, "not tried", None, f"no tiny model of it could be run: {shortened(failure)}")
    shared, positions = trainer.data_collator.share_prefixes, trainer.args.output_positions
    try:
        forms = [("para", False), ("succ", False), ("single", False)] + [("para", True)] * shared
        errors = [worst_error(trainer, mode, positions, share) for mode, share in forms]
        error, head = (max(kind) for kind in zip(*errors, strict=True))
        if head > TOLERANCE[torch.float32]:
            return wrong_head(model_type, trainer, head)
        note = "; ".join(notes(model_type, dtype, trainer, tokenizer, folder, options))
        trainer.data_collator.share_prefixes = shared
        trainer.train()
    except Exception as failure:
        if failed := re.search(r"(\w[^\n]*?) +failed ", str(failure)):
            return Finding(model_type, "refused", None, f"before the first step: the check '{failed[1]}' fails")
        return Finding(model_type, "FAILS", None, shortened(failure))
    verdict = "equal" if error < TOLERANCE[dtype] else "NOT EQUAL"
    settings = [f"`{setting}`" for setting, fix in FIXES.items() if fix.items() <= options.items()]
    if settings:
        verdict += " with " + " and ".join(settings)
    return Finding(model_type, verdict, error, note)


def wrong_head(model_type: str, trainer: MISOSFTTrainer, off_by: float) -> Finding:
    """The verdict where SFTTrainer's loss from hidden states differs from the model's: the checks before training must fail."""
    note = f"before the first step: TRL's fused LM head does not compute the model's loss (off by {off_by:.0e})"
    try:
        trainer.run_checks(2, gradients=False)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) or re.search("loss matches the model's logits +failed", str(error)):
            return Finding(model_type, "refused", None, note)
        return Finding(model_type, "WRONG LOSS", None, shortened(error))
    return Finding(model_type, "WRONG LOSS", None, note)


def notes(
    model_type: str, dtype: torch.dtype, trainer: MISOSFTTrainer, tokenizer: Any, folder: str, options: dict
) -> Iterator[str]:
    """Restrictions that a user of the architecture should know, from the model and from the default config."""
    support, default = trainer.model_support, CONFIG_MAPPING[trainer.model.config.model_type]()
    if trainer.aux_loss_enabled:
        yield f"load-balancing loss of {trainer.router_aux_loss_coef:g} by default"
    if not support.shares:
        yield f"prefixes are not shared: {support.reason}"
    try:
        check_config(default)
    except ValueError as error:
        yield "default config: " + str(error).split("Fix: ")[1].rstrip(".")
    follows = trainer.args.output_positions == "successive"
    windowed = {"sliding_window": 4} if follows and hasattr(trainer.model.config, "sliding_window") else {}
    short = (
        make_trainer(make_model(model_type, dtype, **windowed), tokenizer, folder, **options) if windowed else trainer
    )
    if short.model_support.window:
        error, _ = worst_error(short, "para", "successive", short.data_collator.share_prefixes)
        yield f"para with a window of 4 tokens that binds: {'equal' if error < TOLERANCE[dtype] else 'NOT EQUAL'} ({error:.0e})"
        try:
            guards.check_positions(short.args, "succ", model_type, short.model_support)
        except ValueError:
            yield "succ within the window only"
    size = max(map(head_dim, getattr(default, "per_layer_config", [default])))
    if reason := TorchFlash().refuses(torch.device("cuda"), torch.bfloat16, size, KernelOptions(1.0)):
        yield f"dense kernel on CUDA: {reason}"
    elif getattr(default, "attn_logit_softcapping", None):
        yield "on CUDA needs the flash-attn package, for its softcap"


def shortened(error: Exception) -> str:
    """The part after "Got" of an error in this project's form; of other errors, the beginning."""
    text = " ".join(str(error).split())
    match = re.match(r"Got (.*?)[.,;:]? \(?[Ee]xpected ", text)
    text = match[1] if match else f"{type(error).__name__}: {text}"
    return textwrap.shorten(text, 150, placeholder=" ...").replace("|", "/")


def table(findings: list[Finding]) -> str:
    lines = ["| model type | since | verdict | worst error | note |", "| --- | --- | --- | --- | --- |"]
    for model_type, verdict, error, note, since in findings:
        lines.append(f"| {model_type} | {since} | {verdict} | {'' if error is None else f'{error:.0e}'} | {note} |")
    return "\n".join(lines)


def read_table() -> list[Finding]:
    """The findings in MODELS.md."""
    findings = []
    for line in TABLE.read_text().splitlines():
        if not line.startswith("| ") or line.startswith(("| model type", "| ---")):
            continue
        model_type, since, verdict, error, note = (cell.strip() for cell in line.strip("|").split("|"))
        findings.append(Finding(model_type, verdict, float(error) if error else None, note, since))
    return findings


def document(findings: list[Finding]) -> str:
    versions = sorted({finding.since for finding in findings}, key=Version)
    order = sorted(findings, key=lambda finding: (ORDER.index(finding.verdict.split()[0]), finding.model_type))
    kinds = Counter(finding.verdict for finding in order)
    added = []
    for version in versions[1:]:
        names = sorted(finding.model_type for finding in findings if finding.since == version)
        added.append(f"\nNew in {version}: {', '.join(names)}.")
    return HEADER.format(
        command=COMMAND,
        versions=f"transformers {', '.join(versions)}, torch {torch.__version__}, float64 or, where it has none, float32 on a CPU",
        counts=", ".join(f"{count} {verdict}" for verdict, count in kinds.most_common()),
        added="\n".join(added),
        table=table(order),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="MODEL_TYPE", help="print the lines of these architectures; write nothing"
    )
    parser.add_argument(
        "--new", action="store_true", help="examine the architectures that the table lacks, and add them"
    )
    args = parser.parse_args()
    only, listed = args.only, {finding.model_type: finding for finding in read_table()}
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    tokenizer = build_tokenizer(synthetic_rows(64), vocab_size=512)
    names = only or architectures()
    if args.new:
        names = sorted(set(names) - set(listed))
    with tempfile.TemporaryDirectory() as folder:
        names = track(names, "Architectures", console=Console(stderr=True), transient=True)
        findings = [examine(name, tokenizer, folder) for name in names]
    if only:
        print(table(findings))
        return
    for finding in findings:
        if finding.model_type in listed:
            finding = finding._replace(since=listed[finding.model_type].since)
        listed[finding.model_type] = finding
    TABLE.write_text(document(list(listed.values())))
    print(f"{len(findings)} architectures: {TABLE}")


if __name__ == "__main__":
    main()
