"""`trl-miso sft` as a user runs it: on processes that it starts, and what is heard without configuring logging."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.support.models import tiny_model
from tests.support.processes import REPOSITORY

HEARD = [
    "examples with 24 answers, ",
    "MISO attention runs on the 'cpu' kernel",
    "Verified on this model and 2 short rows",
]
QUIET = ["FutureWarning", "[RANK 0]", "pin_memory", "The following values were not passed to `accelerate launch`"]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TRL_MISO_STARTED")


@pytest.fixture
def folder(tmp_path, para_dataset, tokenizer):
    """A working folder with rows and a model."""
    rows = para_dataset.select_columns(["prompt", "constraints", "completion"])
    Dataset.from_list([rows[i % len(rows)] for i in range(24)]).to_json(tmp_path / "rows.jsonl")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "cpu.yaml").write_text(
        yaml.dump({"distributed_type": "NO", "mixed_precision": "no", "num_processes": 1, "use_cpu": True})
    )
    return tmp_path


def start(folder: Path, *command: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment | ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def heard(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    for line in HEARD:
        assert printed.count(line) == 1, f"{line}\n{printed}"
    for noise in QUIET:
        assert noise not in printed
    return printed


SFT = ["-m", "trl_miso", "sft", "rows.jsonl", "--model", "model", "--output_dir", "out", "--report_to", "none"]
SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "2"]


def test_a_script_of_the_users_is_heard(folder):
    script = """
import datasets, trl_miso
rows = datasets.load_dataset("json", data_files="rows.jsonl", split="train")
args = trl_miso.MISOSFTConfig("out", max_steps=2, bf16=False, dataloader_pin_memory=False, report_to=[])
trl_miso.MISOSFTTrainer("model", args, train_dataset=rows).train()
"""
    heard(start(folder, "-c", script))


def test_logging_that_the_user_configured_is_kept(folder):
    script = """
import logging, datasets, trl_miso
logging.basicConfig(format="MINE %(name)s %(message)s")
logging.getLogger("trl_miso").setLevel(logging.WARNING)
rows = datasets.load_dataset("json", data_files="rows.jsonl", split="train")
args = trl_miso.MISOSFTConfig("out", max_steps=1, bf16=False, neftune_noise_alpha=1.0, report_to=[])
trl_miso.MISOSFTTrainer("model", args, train_dataset=rows).train()
"""
    process = start(folder, "-c", script)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    assert not any(line in printed for line in HEARD)
    assert printed.count("MINE trl_miso.training.trainer") == 1 and "share_prefixes is turned off" in printed


def test_two_processes_that_the_command_starts(folder):
    """With accelerate's own options among the command's; one of them has the value of another option."""
    options = [
        "--num_processes",
        "2",
        "--accelerate_config",
        "ddp",
        "--use_cpu",
        "--mixed_precision=no",
        "--bf16",
        "no",
    ]
    printed = heard(start(folder, *SFT, *SHORT, *options))
    assert "'epoch': '0.3333'" in printed  # 2 steps of 2 x 2 rows
    AutoModelForCausalLM.from_pretrained(folder / "out")


def test_sigterm_reaches_the_process_that_the_command_started(folder):
    process = start(folder, *SFT, "--accelerate_config", "cpu.yaml", "--max_steps", "100000", "--bf16", "no")
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Verified on this model" in line:
                break
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert "Training ends after SIGTERM" in printed, "".join(lines) + printed
    assert process.returncode == 143
    assert list((folder / "out").glob("checkpoint-*/trainer_state.json"))
