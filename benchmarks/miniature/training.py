"""Fine-tuning of the base model with `MISOSFTTrainer`, to an ordinary checkpoint."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import LlamaForCausalLM, PrinterCallback

from benchmarks.common.folders import atomic_folder
from benchmarks.miniature.language import build_tokenizer, draw_rows, messages
from trl_miso import MISOSFTConfig, MISOSFTTrainer


@dataclass(frozen=True)
class Run:
    """One fine-tuning on `rows` rows with 3 to 7 constraints and `plain` requests without any, both drawn from `seed`.

    `options`: the MISOSFTConfig options that define the method.
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
    """Columns prompt, constraints, completion. Rows depend on the seed, not on the method."""
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
    """Fine-tune `base` and write it to `folder`.

    The checks before the first step run for seed 0 only, and their time does not count: the runs are short, and those of a
    method and learning rate differ in their seed alone.

    Returns:
        Steps, tokens computed on (batches hold no padding), and seconds of training.
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
            "gradient_checkpointing": False,  # memory is no concern here, and recomputing takes time
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
        with atomic_folder(folder) as temporary:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(temporary)
    return {"steps": trainer.state.global_step, "tokens": sum(tokens), "seconds": seconds}
