"""What the two ranks of test_interruption.py do, each in a process of its own: gloo DDP on the CPU."""

import os
import signal
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback

from tests.support.models import tiny_model
from trl_miso import MISOSFTConfig, MISOSFTTrainer
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
    """Run a scenario as a rank; what it saw goes into the file `rank`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    seen = {"nan": nan, "sigterm": sigterm, "stream": stream, "verify": verify, "sharded": sharded}[scenario](
        rank, folder
    )
    (folder / str(rank)).write_text(repr(seen))


def trainer(folder: Path, dataset=None, **options) -> MISOSFTTrainer:
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
        processing_class=build_tokenizer(ROWS, vocab_size=512),
    )


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out").glob("*checkpoint*"))


def nan(rank: int, folder: Path):
    """The second step of rank 1 has a NaN; both stop."""
    made = trainer(folder)

    def poison(module, args, out):
        return out * torch.nan if (rank, made.state.global_step) == (1, 1) and module.training else out

    made.model.get_input_embeddings().register_forward_hook(poison)
    try:
        made.train()
    except NonFiniteError as error:
        return str(error), error.__notes__, made.state.global_step, saved(folder)


def sigterm(rank: int, folder: Path):
    """Rank 1 alone is told to end in its second step; both save and end."""
    made = trainer(folder)
    if rank == 1:
        made.add_callback(AtStep(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    try:
        made.train()
    except SystemExit as end:
        return end.code, made.state.global_step, saved(folder)


def stream(rank: int, folder: Path):
    """A stream of shards of 3, 6 and 14 rows: as many batches for each rank, and each row for one of them."""
    dataset = IterableDataset.from_generator(parts, gen_kwargs={"bounds": [(0, 3), (3, 9), (9, 23)]})
    made = trainer(folder, dataset, max_steps=9)
    batches = [batch["miso_rows"].tolist() for batch in made.get_train_dataloader()]
    made.train()
    return batches, made.state.global_step


def verify(rank: int, folder: Path):
    """Under DDP the checks run on every rank, on the same rows."""
    made = trainer(folder)
    made.train()
    return [(check.name, check.status, check.measured) for check in made.verification]


def sharded(rank: int, folder: Path):
    """The checks on a model that FSDP2 has sharded, as a trainer makes them before its first step."""
    made = trainer(folder)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*made.model.model.layers, made.model):
        fully_shard(part, mesh=mesh)
    made.run_checks(2, gradients=False)
    return [(check.name, check.status) for check in made.verification], type(made.model).__name__
