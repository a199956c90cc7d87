"""Scenarios of two ranks, for test_interruption.py and test_predictions.py, each in a process of its own: gloo DDP on the CPU."""

import os
import signal
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.support.models import tiny_model
from trl_miso import MISOEvalCallback, MISOSFTConfig, MISOSFTTrainer
from trl_miso.sources.crab import crab_row
from trl_miso.sources.synthetic import build_tokenizer, synthetic_rows
from trl_miso.training.interruption import NonFiniteError

ROWS = synthetic_rows(24, seed=1)


def parts(bounds):
    for start, end in bounds:
        yield from map(crab_row, ROWS[start:end])


class AtStep(TrainerCallback):
    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def start(rank: int, port: int, scenario: str, folder: Path) -> None:
    """Run a scenario as one rank and write its result to the file `rank`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    scenarios = {"nan": nan, "sigterm": sigterm, "stream": stream, "verify": verify, "sharded": sharded}
    scenarios |= {"predictions": predictions, "sigterm_in_evaluation": sigterm_in_evaluation}
    scenarios |= {"sigterm_in_generation": sigterm_in_generation}
    scenarios |= {"resumed_stream": resumed_stream}
    result = scenarios[scenario](rank, folder)
    (folder / str(rank)).write_text(repr(result))


def make_trainer(folder: Path, dataset=None, eval_dataset=None, **options) -> MISOSFTTrainer:
    defaults = {
        "output_dir": str(folder / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_steps": 100,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    return MISOSFTTrainer(
        tiny_model("llama"),
        MISOSFTConfig(**defaults | options),
        train_dataset=Dataset.from_list(list(parts([(0, 24)]))) if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=build_tokenizer(ROWS, vocab_size=512),
    )


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").glob("*checkpoint*"))


def nan(rank: int, folder: Path):
    """The second step of rank 1 has a NaN; both ranks stop."""
    trainer = make_trainer(folder)

    def poison(module, args, out):
        return out * torch.nan if (rank, trainer.state.global_step) == (1, 1) and module.training else out

    trainer.model.get_input_embeddings().register_forward_hook(poison)
    try:
        trainer.train()
    except NonFiniteError as error:
        return str(error), error.__notes__, trainer.state.global_step, saved(folder)


def sigterm(rank: int, folder: Path):
    """Only rank 1 receives SIGTERM, in its second step; both ranks save and end."""
    trainer = make_trainer(folder)
    if rank == 1:
        trainer.add_callback(AtStep(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    try:
        trainer.train()
    except SystemExit as end:
        return end.code, trainer.state.global_step, saved(folder)


def sigterm_in_evaluation(rank: int, folder: Path):
    """Only rank 1 receives SIGTERM, in the second batch of an evaluation."""
    rows = Dataset.from_list(list(parts([(0, 24)])))
    trainer = make_trainer(folder, eval_dataset=rows, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=1)
    batches = []
    real = trainer.prediction_step

    def prediction_step(*args, **kwargs):
        batches.append(1)
        if rank == 1 and len(batches) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    trainer.prediction_step = prediction_step
    try:
        trainer.train()
    except SystemExit as end:
        return end.code, trainer.state.global_step, saved(folder), len(batches)


def sigterm_in_generation(rank: int, folder: Path):
    """Only rank 1 receives SIGTERM, in the second of its batches of responses; rank 0 has one batch more."""
    trainer = make_trainer(
        folder, eval_dataset=Dataset.from_list(list(parts([(0, 2)]))), eval_strategy="steps", eval_steps=1
    )
    judged = []

    def judge(row, response):
        if trainer.state.global_step == 1:  # the scorer is tried before training
            judged.append(row["prompt"])
            if rank == 1 and len(judged) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return [True]

    prompts = [{"prompt": f"Say {number}."} for number in range(9)]
    trainer.add_callback(MISOEvalCallback(trainer, prompts, judge, max_new_tokens=2, batch_size=1))
    try:
        trainer.train()
    except SystemExit as end:
        return end.code, trainer.state.global_step, saved(folder), len(judged)


def stream(rank: int, folder: Path):
    """A stream of shards of 3, 6 and 14 rows: the ranks get the same number of batches, and each row goes to one of them."""
    dataset = IterableDataset.from_generator(parts, gen_kwargs={"bounds": [(0, 3), (3, 9), (9, 23)]})
    trainer = make_trainer(folder, dataset, max_steps=9)
    batches = [batch["miso_rows"].tolist() for batch in trainer.get_train_dataloader()]
    trainer.train()
    return batches, trainer.state.global_step


def resumed_stream(rank: int, folder: Path):
    """A shuffled stream with 3 batches in a pass: step, epoch and loss, of 7 steps and of those after step 5."""
    courses = []
    for resume in (None, str(folder / "out" / "checkpoint-5")):
        dataset = IterableDataset.from_generator(parts, gen_kwargs={"bounds": [(0, 3), (3, 10)]})
        options = {"max_steps": 7, "save_steps": 5, "verify": False}
        trainer = make_trainer(folder, dataset.shuffle(seed=1, buffer_size=4), **options)
        trainer.train(resume_from_checkpoint=resume)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        courses.append([(log["step"], log["epoch"], log["loss"], log["grad_norm"]) for log in logs])
    whole, resumed = courses
    return whole, resumed[-2:]


def verify(rank: int, folder: Path):
    """Under DDP every rank runs the checks, on the same rows."""
    trainer = make_trainer(folder)
    trainer.train()
    return [(check.name, check.status, check.measured) for check in trainer.verification]


def sharded(rank: int, folder: Path):
    """The checks of the first step, on a model that FSDP2 has sharded."""
    trainer = make_trainer(folder)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*trainer.model.model.layers, trainer.model):
        fully_shard(part, mesh=mesh)
    trainer.run_checks(2, gradients=False)
    return [(check.name, check.status) for check in trainer.verification], type(trainer.model).__name__


def predictions(rank: int, folder: Path):
    """Losses of 7 rows in batches of 2, by SFTTrainer, MISOSFTTrainer in single mode, `predict`, and in bins."""
    rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in ROWS[:7]]
    dataset = Dataset.from_list(rows)

    def losses(prediction):
        pairs = zip(torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids), strict=True)
        found = [cross_entropy(p[:-1].double(), y[1:], ignore_index=-100, reduction="sum").item() for p, y in pairs]
        return {"losses": found}

    def make(trainer_class, config_class, **options):
        settings = {
            "output_dir": str(folder / "out"),
            "bf16": False,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
        }
        config = config_class(**settings | {"per_device_eval_batch_size": 2} | options)
        tokenizer = build_tokenizer(ROWS, vocab_size=512)
        return trainer_class(tiny_model("llama"), config, None, dataset, dataset, tokenizer, compute_metrics=losses)

    results = []
    for trainer in (make(SFTTrainer, SFTConfig), make(MISOSFTTrainer, MISOSFTConfig, context_mode="single")):
        metrics = trainer.evaluate()
        results.append({name: metrics[f"eval_{name}"] for name in ("loss", "losses")})
    results.append({"losses": trainer.predict(dataset).metrics["test_losses"]})
    packed = make(MISOSFTTrainer, MISOSFTConfig, packing=True, max_length=450, per_device_eval_batch_size=1)
    results.append({"losses": packed.evaluate()["eval_losses"], "bins": len(packed.eval_dataset)})
    return results
