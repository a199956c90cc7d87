"""One process of test_distributed.py's launches: train every scenario of FOLDER/NAME.json and write the results.

    torchrun --nproc_per_node 2 tests/support/distributed_script.py FOLDER NAME

A launch runs several scenarios, since starting a process costs ten seconds of imports. The test itself calls `run` for a single
process.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import load_from_disk
from torch.distributed.tensor import DTensor

from trl_miso import MISOSFTConfig, MISOSFTTrainer

COLUMNS = ("input_ids", "labels", "miso_layout")
OPTIONS = {
    "max_steps": 4,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "adam_epsilon": 1e-4,  # otherwise rounding decides the sign of the update for gradients near zero
    "per_device_train_batch_size": 1,
    "max_length": 512,
    "bf16": False,
    "report_to": [],
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "ddp_timeout": 60,  # a rank that waits in vain becomes an error
}


class Recorder(MISOSFTTrainer):
    """Records the rows of every batch, and the optimizer step of each batch."""

    def get_train_dataloader(self):
        collate, self.batches, self.steps = self.data_collator, [], []

        def record(rows):
            self.batches.append([{name: row[name] for name in COLUMNS} for row in rows])
            return collate(rows)

        self.data_collator = record
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def training_step(self, *args, **kwargs):
        self.steps.append(self.state.global_step)
        return super().training_step(*args, **kwargs)


def run(folder: Path, rows: str = "rows", shards: int = 0, lora: bool = False, keep: str = "", **options: Any) -> dict:
    """Train on prepared rows; return the losses, and the rows of each optimizer step on this rank.

    Args:
        rows: Folder of the prepared rows.
        shards: Train on a stream of this many shards; 0 for a Dataset.
        keep: Folder for the trained model and its checkpoints.
    """
    dataset = load_from_disk(folder / rows)
    resume = options.pop("resume_from_checkpoint", None)
    config = MISOSFTConfig(**{"output_dir": str(folder / (keep or "unsaved"))} | OPTIONS | options)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate allows FSDP on accelerators only, but runs it on a CPU that it takes for one.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = Recorder(
        str(folder / "model"),
        config,
        train_dataset=dataset.to_iterable_dataset(num_shards=shards) if shards else dataset,
        peft_config=_lora() if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    if keep:
        trainer.save_model()
    steps = [[] for _ in range(trainer.state.global_step)]
    for step, batch in zip(
        trainer.steps, trainer.batches, strict=False
    ):  # the last batch may be read ahead of its step
        steps[step].append(batch)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "steps": steps,
        "rows": [{name: row[name] for name in COLUMNS} for row in trainer.train_dataset],
        "held": _held(trainer.model),
    }


def _held(model: torch.nn.Module) -> float:
    """Share of the model's weights that this process holds between steps."""
    held = total = 0
    for p in model.parameters():
        total += getattr(p, "ds_numel", p.numel())
        held += p.to_local().numel() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p).numel()
    return held / total


def _lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])


def main(folder: Path, name: str) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it takes a minute
    for scenario, arguments in json.loads((folder / f"{name}.json").read_text()).items():
        result = run(folder, **arguments)
        torch.save(result, folder / f"{name}-{scenario}-{PartialState().process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
