"""The processes of test_resume.py: train a tiny model, and be killed or run out of disk space at a given moment."""

import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from tests.support.models import tiny_model
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.sources.crab import crab_row
from trl_miso.sources.synthetic import build_tokenizer, synthetic_rows

STEPS = 8


class Course(TrainerCallback):
    """Append the loss and gradient norm of each step to course.jsonl, and call `act` when `at` steps are done."""

    def __init__(self, folder: Path, at: int | None, act):
        self.folder, self.at, self.act = folder, at, act

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            with open(self.folder / "course.jsonl", "a") as file:
                file.write(json.dumps([state.global_step, logs["loss"], logs["grad_norm"]]) + "\n")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.act()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def fill_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def kill_in_write(number: int):
    """Be killed in the `number`-th write, replacement or removal of a save, with the file half-written."""
    calls = itertools.count(1)

    def kill_in(owner, name, written=None):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            if next(calls) != number:
                return real(*args, **kwargs)
            if written is not None:
                real(*args, **kwargs)
                path = Path(written(*args))
                os.truncate(path, path.stat().st_size // 2)
            return kill()

        setattr(owner, name, call)

    kill_in(PreTrainedModel, "save_pretrained", lambda model, folder, **_: Path(folder) / "model.safetensors")
    kill_in(torch, "save", lambda value, path: path)
    kill_in(TrainerState, "save_to_json", lambda state, path: path)
    kill_in(Path, "write_text", lambda path, text: path)
    kill_in(os, "replace")
    kill_in(shutil, "rmtree")


def train(folder: Path, resume, at: int | None = None, act=kill, in_write: int | None = None, **options):
    """Train to the end, or until `act` ends training. Write a digest of the weights to `final`, or an exception to `error`."""
    lora, stream, evaluate = (options.pop(name, None) for name in ("lora", "stream", "evaluate"))
    multiprocessing.set_start_method("fork", force=True)  # quicker for data workers than a server of their own
    rows = synthetic_rows(14, seed=1)  # 4 steps per epoch, of which the last has one batch
    dataset = Dataset.from_list(rows).map(crab_row, remove_columns=list(rows[0]))
    model = tiny_model("llama")
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
        torch.manual_seed(0)
    defaults = {
        "output_dir": str(folder / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    if evaluate:
        defaults |= {"eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}
    trainer = MISOSFTTrainer(
        model,
        MISOSFTConfig(**defaults | options),
        train_dataset=dataset.to_iterable_dataset() if stream else dataset,
        eval_dataset=dataset if evaluate else None,
        processing_class=build_tokenizer(rows, vocab_size=512),
        callbacks=[Course(folder, at, act)],
        peft_config=peft_config,
    )
    if evaluate:  # a metric that is the best at the first checkpoint
        trainer.evaluate = lambda *_, **__: {f"eval_{evaluate}": -trainer.state.global_step}
    if in_write:
        kill_in_write(in_write)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception as error:
        (folder / "error").write_text(f"{type(error).__name__}: {error}")
        raise
    weights = [p.detach().numpy().tobytes() for p in trainer.model.parameters() if p.requires_grad]
    (folder / "final").write_text(hashlib.sha256(b"".join(weights)).hexdigest())
