"""Fine-tuning by `MISOSFTTrainer`, which leaves an ordinary checkpoint."""

import logging
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import transformers
from datasets import Dataset
from transformers import LlamaForCausalLM, PrinterCallback

from benchmarks.miniature.language import build_tokenizer, draw_rows, messages
from benchmarks.miniature.pretraining import whole
from trl_miso import MISOSFTConfig, MISOSFTTrainer


@dataclass(frozen=True)
class Run:
    """One fine-tuning on `rows` rows with 3 to 7 constraints and `plain` requests without any, both drawn from `seed`.

    `options` are MISOSFTConfig's, what makes the method.
    """

    method: str
    options: dict[str, Any]
    learning_rate: float
    seed: int
    rows: int
    plain: int
    epochs: int
    batch: int


def tuning_rows(run: Run) -> Dataset:
    """Columns prompt, constraints, completion: the same for every method with this seed."""
    counts = [3 + i % 5 for i in range(run.rows)] + [0] * run.plain
    rows = [
        {
            "prompt": messages("user", row["request"]),
            "constraints": row["constraints"],
            "completion": messages("assistant", row["text"]),
        }
        for row in draw_rows("train", f"tuning-{run.seed}", counts)
    ]
    return Dataset.from_list(rows)


def finetune(base: Path, run: Run, folder: Path, device: str) -> dict[str, float]:
    """Write `base`, fine-tuned, to `folder`; steps, tokens computed on (padding there is none) and seconds of training.

    What `train` verifies before its first step is verified here for seed 0 only, and outside of the seconds: the runs are
    short, and differ by their seed alone.
    """
    model = LlamaForCausalLM.from_pretrained(base)
    with tempfile.TemporaryDirectory() as output:
        options = {
            "output_dir": output,
            "learning_rate": run.learning_rate,
            "num_train_epochs": run.epochs,
            "per_device_train_batch_size": run.batch,
            "warmup_steps": 0.1,
            "max_length": 512,
            "seed": run.seed,
            "bf16": device == "cuda",
            "use_cpu": device == "cpu",
            "gradient_checkpointing": False,  # which saves memory, at the price of time
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "verify": False,
        }
        trainer = MISOSFTTrainer(
            model,
            MISOSFTConfig(**options | run.options),
            train_dataset=tuning_rows(run),
            processing_class=build_tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        if run.seed == 0:
            trainer.run_checks(2, gradients=False)
        tokens = []
        trainer.model.register_forward_pre_hook(
            lambda _, __, inputs: tokens.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        with whole(folder) as made:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(made)
    return {"steps": trainer.state.global_step, "tokens": sum(tokens), "seconds": seconds}


def silence() -> None:
    """Hundreds of runs say the same."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
