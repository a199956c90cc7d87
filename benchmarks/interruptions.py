"""
Runs that are killed or told to end at random moments, resumed until they are done, and compared with a run left alone.

    python -m benchmarks.interruptions --kills 50 --terms 20

Each kind of run is killed (SIGKILL) again and again, at moments drawn from the time that it takes, and each time resumed from
its newest complete checkpoint. In the end its weights and its losses have to be those of the run left alone, bit for bit.
A run with evaluations and generation gets SIGTERM at random moments: it has to end with status 143 and leave a checkpoint of
its last step. The seconds are the longest time from the signal to the end of the process.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
import transformers
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.measure import machine, print_table
from trl_miso import MISOEvalCallback, MISOSFTConfig, MISOSFTTrainer
from trl_miso.sources.crab import crab_row
from trl_miso.sources.synthetic import build_tokenizer, synthetic_rows

STEPS = 12
PLAIN = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, "logging_steps": 1}
# Settings of each kind of run; `stream`, `lora` and `scores` are this module's own.
KILLED: dict[str, dict[str, Any]] = {
    "stream past its first pass": {"stream": 14},
    "stream, data workers": {"stream": 14, "dataloader_num_workers": 2},
    "packing, accumulation": {"packing": True, "gradient_accumulation_steps": 2, "max_length": 256},
    "LoRA with dropout": {"lora": 0.1},
    "chunk draws, para_prob, NEFTune": {"para_prob": 0.5, "neftune_noise_alpha": 5.0},
    "data workers": {"dataloader_num_workers": 2},
}
TERMINATED = {"scores": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 40, "save_steps": 5}


def train(folder: Path, options: dict[str, Any]) -> None:
    """Train, from the newest complete checkpoint if there is one; write the losses and weights once training is done."""
    options = PLAIN | options
    stream, lora, scores = (options.pop(name, None) for name in ("stream", "lora", "scores"))
    rows = synthetic_rows(stream or 48, seed=1)
    tokenizer = build_tokenizer(synthetic_rows(48, seed=1), vocab_size=512)
    dataset: Any = datasets.Dataset.from_list(rows)
    dataset = dataset.map(crab_row, remove_columns=dataset.column_names)
    evaluated = dataset.select(range(8))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes))
    config = MISOSFTConfig(
        str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = MISOSFTTrainer(
        model,
        config,
        train_dataset=dataset.to_iterable_dataset() if stream else dataset,
        eval_dataset=evaluated if scores else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_dropout=lora, target_modules=["q_proj", "up_proj"]) if lora else None,
    )
    if scores:
        prompts = [{"prompt": row["prompt"]} for row in evaluated]
        trainer.add_callback(MISOEvalCallback(trainer, prompts, lambda row, response: [True], max_new_tokens=64))
    resumes = any(path.name.startswith("checkpoint-") for path in folder.glob("*"))
    try:
        trainer.train(resume_from_checkpoint=resumes or None)
    finally:
        (folder / "step").write_text(str(trainer.state.global_step))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    torch.save({"losses": losses, "weights": trained}, folder / "end.pt")


def in_child(work: Callable[[], None]) -> int:
    """Run in a process of its own, which shares what is imported here; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY) if "VERBOSE" not in os.environ else descriptor, descriptor)
        work()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(pid: int, seconds: float) -> int | None:
    """The status of a process; None if it still runs after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same losses and weights, bit for bit."""
    left, right = torch.load(a / "end.pt"), torch.load(b / "end.pt")
    weights = left["weights"].keys() == right["weights"].keys()
    return (
        weights
        and all(torch.equal(p, right["weights"][n]) for n, p in left["weights"].items())
        and (left["losses"] == right["losses"])
    )


def kill_until_done(options: dict[str, Any], folder: Path, kills: int, draw: random.Random) -> list[str]:
    alone, killed = folder / "alone", folder / "killed"
    start = time.monotonic()
    assert wait(in_child(lambda: train(alone, options)), 600) == 0
    duration = time.monotonic() - start
    done, failed = 0, 0
    while not (killed / "end.pt").exists() or done < kills:
        if (killed / "end.pt").exists():  # done before it was killed often enough: once more from the beginning
            failed += not same(alone, killed)
            shutil.rmtree(killed)
        pid = in_child(lambda: train(killed, options))
        moment = draw.uniform(0.2, 1.2) * duration if done < kills else 600.0
        status = wait(pid, moment)
        if status is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done += 1
        elif status:
            raise RuntimeError(f"A resumed run ended with status {status}: {killed}")
    failed += not same(alone, killed)
    return [f"{done} kills", "bit for bit" if not failed else f"{failed} ends differ"]


def terminate(folder: Path, times: int, draw: random.Random) -> list[str]:
    start = time.monotonic()
    assert wait(in_child(lambda: train(folder / "alone", TERMINATED)), 600) == 0
    duration, done, slowest, faults = time.monotonic() - start, 0, 0.0, list[str]()
    while done < times:
        run = folder / f"run-{done}"
        pid = in_child(lambda: train(run, TERMINATED))  # noqa: B023 - called at once, in the child
        if wait(pid, draw.uniform(0.1, 0.95) * duration) is not None:
            shutil.rmtree(run, ignore_errors=True)
            continue
        os.kill(pid, signal.SIGTERM)
        start = time.monotonic()
        status = wait(pid, 120)
        slowest = max(slowest, time.monotonic() - start)
        states = [json.loads(path.read_text())["global_step"] for path in run.glob("checkpoint-*/trainer_state.json")]
        if status == 143:
            step = int((run / "step").read_text())
            if max(states, default=0) != step:
                faults.append(f"step {step} is not saved")
        elif status != -signal.SIGTERM or states:  # before training the signal ends the process as usual
            faults.append(f"status {status}")
        done += 1
        shutil.rmtree(run, ignore_errors=True)
    return [f"{done} SIGTERM", f"ended and saved in {slowest:.1f} s at most" if not faults else "; ".join(faults)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills, over all kinds of runs")
    parser.add_argument("--terms", type=int, default=20, help="number of SIGTERMs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    draw = random.Random(args.seed)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for i, (name, options) in enumerate(KILLED.items()):
            kills = args.kills * (i + 1) // len(KILLED) - args.kills * i // len(KILLED)
            if not kills:
                continue
            rows.append([name, *kill_until_done(options, Path(temporary) / str(i), kills, draw)])
            print(*rows[-1], sep=" | ", flush=True)
        if args.terms:
            rows.append(["evaluation and generation", *terminate(Path(temporary) / "terms", args.terms, draw)])
    print(machine("cpu"))
    print_table("Runs interrupted at random moments", ["", "interrupted", "result"], rows)


if __name__ == "__main__":
    main()
