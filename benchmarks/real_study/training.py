"""Fine-tuning of the base model by one method, with `MISOSFTTrainer`."""

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback

from benchmarks.real_study.rows import conversation
from benchmarks.real_study.signals import BothTrainer, DistillTrainer, LabelledTrainer, annealed, weighted_by_misses
from benchmarks.real_study.study import METHODS, Study
from trl_miso import MISOSFTConfig, MISOSFTTrainer

_TRAINERS = {"both": BothTrainer, "distill": DistillTrainer}


@dataclass(frozen=True)
class Run:
    method: str
    learning_rate: float
    seed: int


def drawn_rows(train: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """All training rows in an order drawn from the seed, as columns of the trainer. A run takes the first of them."""
    rows = []
    for row in train:
        messages = {"prompt": conversation(row["prompt"]), "completion": conversation("", row["completion"])[1:]}
        rows.append(row | messages)
    random.Random(seed).shuffle(rows)
    return rows


def presented_rows(rows: Sequence[dict[str, Any]], signal: str | None, seed: int) -> Dataset:
    """The rows as the method's signal presents them. `followed`, which constraints the model's own answer followed, is for `misses`."""
    presented = [{name: row[name] for name in ("prompt", "constraints", "completion")} for row in rows]
    if signal == "misses":
        followed = [row["followed"] for row in rows]
        presented = [weighted_by_misses(row, flags) for row, flags in zip(presented, followed, strict=True)]
    if signal == "anneal":
        presented = annealed(presented, seed)
    return Dataset.from_list(presented)


def build_trainer(
    model: PreTrainedModel,
    tokenizer: Any,
    run: Run,
    study: Study,
    rows: Sequence[dict[str, Any]],
    output: str,
    device: str,
    bf16: bool,
) -> MISOSFTTrainer:
    method = METHODS[run.method]
    options = {
        "output_dir": output,
        "learning_rate": run.learning_rate,
        "num_train_epochs": study.epochs,
        "per_device_train_batch_size": study.batch,
        "train_sampling_strategy": "sequential",  # the rows are in the order of their draw, which `anneal` needs
        "warmup_steps": 0.1,
        "max_length": 1024,
        "seed": run.seed,
        "bf16": bf16,
        "use_cpu": device == "cpu",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "verify": False,  # tests/real verifies this model
    }
    trainer_class = _TRAINERS.get(method.signal or "", LabelledTrainer)
    trainer = trainer_class(
        model,
        MISOSFTConfig(**options | method.options),
        train_dataset=presented_rows(rows, method.signal, run.seed),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def num_tokens(trainer: MISOSFTTrainer) -> int:
    """Tokens that an epoch computes on. Batches hold no padding, and shared prefixes count once."""
    return sum(map(len, trainer.train_dataset["input_ids"]))


def finetune(
    base: Path, tokenizer: Any, run: Run, study: Study, train: Sequence[dict[str, Any]], device: str, bf16: bool
) -> tuple[PreTrainedModel, dict[str, float]]:
    """The fine-tuned model, and the run's rows, steps, tokens and seconds."""
    drawn = drawn_rows(train, run.seed)
    with tempfile.TemporaryDirectory() as output:
        rows = drawn[: study.rows]
        if matched := METHODS[run.method].matches:
            rows = _matching(base, tokenizer, Run(matched, 0, run.seed), run, study, drawn, output, device, bf16)
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        trainer = build_trainer(model, tokenizer, run, study, rows, output, device, bf16)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        work = {
            "rows": len(rows),
            "steps": trainer.state.global_step,
            "tokens": num_tokens(trainer) * study.epochs,
            "seconds": round(seconds, 1),
        }
    return trainer.accelerator.unwrap_model(trainer.model).eval(), work


def _matching(
    base: Path,
    tokenizer: Any,
    matched: Run,
    run: Run,
    study: Study,
    drawn: list[dict[str, Any]],
    output: str,
    device: str,
    bf16: bool,
) -> list[dict[str, Any]]:
    """As many rows as give this run the tokens of the matched run's epoch; the rows begin anew where they end."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    target = num_tokens(build_trainer(model, tokenizer, matched, study, drawn[: study.rows], output, device, bf16))
    own = build_trainer(model, tokenizer, run, study, drawn, output, device, bf16)
    lengths = list(map(len, own.train_dataset["input_ids"]))
    rows: list[dict[str, Any]] = []
    tokens = 0
    while tokens < target:
        i = len(rows) % len(drawn)
        rows.append(drawn[i])
        tokens += lengths[i]
    return rows
