"""`torch_compile=True`: no more graph breaks and compiled frames than SFTTrainer, and the losses of a run that is not compiled."""

import pytest
import torch
from torch._dynamo.utils import counters
from trl import SFTConfig, SFTTrainer

from tests.support.models import tiny_model
from trl_miso import MISOSFTTrainer

COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def run(trainer_class, config, rows, tokenizer):
    """Losses, graph breaks and compiled frames of a run."""
    torch.compiler.reset()
    counters.clear()
    model = tiny_model("llama", num_hidden_layers=1)
    trainer = trainer_class(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, sum(counters["graph_break"].values()), counters["frames"]["ok"]


def test_compiles_as_sft_trainer_does(para_dataset, tokenizer, make_config):
    """In two compiled steps, which are MISO's second and third: its first step is not compiled."""
    packed = {"packing": True, "max_length": 512, "gradient_checkpointing": True}
    plain = para_dataset.map(lambda row: {"prompt": row["full_prompt"]}).select_columns(["prompt", "completion"])
    _, breaks, frames = run(SFTTrainer, make_config(SFTConfig, **packed, **COMPILED), plain, tokenizer)
    for options in (
        packed | {"context_mode": "para"},
        {"context_mode": "succ", "chunk_probs": [0.0, 1.0]},  # neither packed nor recomputed
    ):
        options = options | {"max_steps": 3}
        expected, *_ = run(MISOSFTTrainer, make_config(**options), para_dataset, tokenizer)
        losses, *counts = run(MISOSFTTrainer, make_config(**options, **COMPILED), para_dataset, tokenizer)
        print(options["context_mode"], counts, "SFTTrainer", [breaks, frames])
        assert counts[0] <= breaks and counts[1] <= frames
        assert losses == pytest.approx(expected, rel=1e-6)  # float32: 2**-24, over sums and two updates
