"""
Which architectures can be trained with MISO: compare each with one-row-per-context execution.

    python -m benchmarks.supported_models                           # writes benchmarks/results/MODELS.md
    python -m benchmarks.supported_models --only llama gemma2 bloom # prints the lines of these

Each of transformers' language models for text is built tiny, with random weights, and given to MISOSFTTrainer. It is equal if
the trainer's loss and every parameter's gradient equal those of one-row-per-context execution in every form: para with shared
and with unshared prefixes, succ, and rows of one context. Otherwise it has to be refused before training, with a reason.
Anything else is a bug and is shown as one ("NOT EQUAL", "WRONG LOSS", "FAILS").
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
from rich.console import Console
from rich.progress import track
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.models import CONFIGS, architectures, tiny_model
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
POSITIONS = ("successive", "after_longest")
ORDER = ("NOT", "WRONG", "FAILS", "equal", "refused", "not")
HEADER = """\
# Which architectures can be trained with MISO

Made by `{command}`
({versions}): {counts}.

Each language model for text in transformers is built tiny, with random weights, and given to `MISOSFTTrainer`.

- **equal**: the trainer's loss and the gradient of every parameter equal those of one-row-per-context execution, for para (with
  and without shared prefixes), succ and rows of one context. *Worst error* is the largest of all relative errors.
- **refused**: an error, for the reason given, when the trainer is built or by the checks before its first step.
- **not tried**: no tiny model of the architecture could be built and run.

Tiny models have the layer kinds of the architecture's default config. A checkpoint with another config is checked when it is trained.

{table}
"""
NAMES = {config().model_type: name for name, config in reversed(CONFIGS.items())}


class Finding(NamedTuple):
    """Verdict on one architecture. `error`: the worst relative error of the loss and of all parameters' gradients."""

    model_type: str
    verdict: str
    error: float | None
    note: str


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
    defaults = {"max_length": MAX_LENGTH, "router_aux_loss_coef": 0.0, "gradient_checkpointing": False}
    defaults |= {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    dataset = Dataset.from_list(rows("para", options.get("output_positions", "successive")))
    args = MISOSFTConfig(folder, **defaults | options)
    return MISOSFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)


def make_model(name: str, dtype: torch.dtype, **overrides: Any) -> Any:
    """A tiny model that looks trained: noise on all one-dimensional parameters, so that no bias is 0 and no norm weight 1."""
    model = tiny_model(name, dtype, **overrides)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def worst_error(trainer: MISOSFTTrainer, mode: str, positions: str, share: bool) -> tuple[float, float]:
    """Relative errors of the trainer against one row per context.

    Returns:
        The worst of the loss and of every parameter's gradient, and the error of the loss that the trainer computes without
        logits. A gradient's error is relative to its largest entry, or to a thousandth of the model's largest where the
        gradient is zero up to rounding.
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
    logits = model(**batch, use_cache=False).logits[0, :-1]
    got = torch.nn.functional.cross_entropy(logits.double(), labels, ignore_index=-100)
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
    name = NAMES.get(model_type, model_type)
    failure = None
    for dtype in TOLERANCE:  # some mixture-of-experts layers have no float64
        try:
            make_model(name, dtype)(input_ids=torch.tensor([CONTEXTS[0]]))
            failure = None
            break
        except Exception as error:
            failure = error
    refused = []
    for positions in POSITIONS:
        try:
            trainer = make_trainer(make_model(name, dtype), tokenizer, folder, output_positions=positions)
            break
        except ValueError as error:
            refused.append(error)
        except Exception as error:
            if failure is None:
                return Finding(model_type, "FAILS", None, shortened(error))
            break
    else:
        if re.search("Got .*xpected.*Fix", str(refused[0]), re.DOTALL):
            return Finding(model_type, "refused", None, shortened(refused[0]))
        if failure is None:
            return Finding(model_type, "FAILS", None, shortened(refused[0]))
    if failure is not None:  # the model fails without MISO too
        return Finding(model_type, "not tried", None, f"no tiny model of it could be run: {shortened(failure)}")
    shared = trainer.data_collator.share_prefixes
    try:
        forms = [("para", False), ("succ", False), ("single", False)] + [("para", True)] * shared
        errors = [worst_error(trainer, mode, positions, share) for mode, share in forms]
        note = "; ".join(notes(name, dtype, trainer, tokenizer, folder))
    except Exception as failure:
        return Finding(model_type, "FAILS", None, shortened(failure))
    error, head = (max(kind) for kind in zip(*errors, strict=True))
    verdict = "equal" if error < TOLERANCE[dtype] else "NOT EQUAL"
    if head > TOLERANCE[torch.float32]:
        return wrong_head(model_type, trainer, head)
    if refused:
        verdict += f" with `output_positions={positions!r}`"
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


def notes(name: str, dtype: torch.dtype, trainer: MISOSFTTrainer, tokenizer: Any, folder: str) -> Iterator[str]:
    """Restrictions that a user of the architecture should know, from the model and from the default config."""
    support, default = trainer.model_support, CONFIG_MAPPING[trainer.model.config.model_type]()
    if not support.shares:
        yield f"prefixes are not shared: {support.reason}"
    try:
        check_config(default)
    except ValueError as error:
        yield "default config: " + str(error).split("Fix: ")[1].rstrip(".")
    follows = trainer.args.output_positions == "successive"
    windowed = {"sliding_window": 4} if follows and hasattr(trainer.model.config, "sliding_window") else {}
    short = make_trainer(make_model(name, dtype, **windowed), tokenizer, folder) if windowed else trainer
    if short.model_support.window:
        error, _ = worst_error(short, "para", "successive", short.data_collator.share_prefixes)
        yield f"para with a window of 4 tokens that binds: {'equal' if error < TOLERANCE[dtype] else 'NOT EQUAL'} ({error:.0e})"
        try:
            guards.check_positions(short.args, "succ", name, short.model_support)
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
    lines = ["| model type | verdict | worst error | note |", "| --- | --- | --- | --- |"]
    for model_type, verdict, error, note in findings:
        lines.append(f"| {model_type} | {verdict} | {'' if error is None else f'{error:.0e}'} | {note} |")
    return "\n".join(lines)


def document(findings: list[Finding]) -> str:
    kinds = Counter(finding.verdict for finding in findings)
    order = sorted(findings, key=lambda finding: ORDER.index(finding.verdict.split()[0]))
    return HEADER.format(
        command=COMMAND,
        versions=f"transformers {transformers.__version__}, torch {torch.__version__}, float64 or, where it has none, float32 on a CPU",
        counts=", ".join(f"{count} {verdict}" for verdict, count in kinds.most_common()),
        table=table(order),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="MODEL_TYPE", help="print the lines of these architectures; write nothing"
    )
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    tokenizer = build_tokenizer(synthetic_rows(64), vocab_size=512)
    with tempfile.TemporaryDirectory() as folder:
        names = track(only or architectures(), "Architectures", console=Console(stderr=True), transient=True)
        findings = [examine(name, tokenizer, folder) for name in names]
    if only:
        print(table(findings))
    else:
        TABLE.write_text(document(findings))
        print(f"{len(findings)} architectures: {TABLE}")


if __name__ == "__main__":
    main()
