"""A stream is resumed where it was, in whichever pass: from each checkpoint on, losses and weights are the uninterrupted run's."""

import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.support.models import tiny_model
from trl_miso import MISOSFTTrainer
from trl_miso.training import reliability

STEPS = 7
AHEAD = 2  # steps that a resumed run makes: more than one, since batches at the end of a pass belong to the next step


class Course(TrainerCallback):
    """Note the loss, the epoch and the weights of each step, and end training at step `end`."""

    def __init__(self, end):
        self.end, self.steps = end, {}

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" in logs:
            weights = [p.detach().clone() for p in model.parameters()]
            self.steps[state.global_step] = (logs["loss"], logs["grad_norm"], logs["epoch"], weights)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.end


@pytest.fixture
def train(tmp_path, tokenizer, para_dataset, make_config):
    def train(resume=None, end=STEPS, rows=14, shards=1, shuffle=False, trainer_class=MISOSFTTrainer, **options):
        options = {"max_steps": STEPS, "per_device_train_batch_size": 2, "save_strategy": "steps"} | options
        options = {"save_steps": 1, "logging_nan_inf_filter": False} | options
        stream = Dataset.from_list(para_dataset.to_list()[:rows]).to_iterable_dataset(num_shards=shards)
        course = Course(end)
        torch.manual_seed(0)
        trainer = trainer_class(
            tiny_model("llama", vocab_size=len(tokenizer)),
            make_config(**options),
            train_dataset=stream.shuffle(buffer_size=5, seed=3) if shuffle else stream,
            eval_dataset=para_dataset.select(range(2)) if "eval_strategy" in options else None,
            processing_class=tokenizer,
            callbacks=[course],
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{resume}") if resume else None)
        return course.steps

    return train


def checkpoints(tmp_path):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / "out").glob("checkpoint-*"))


def same(step, other):
    *numbers, weights = step
    *others, other_weights = other
    return numbers == others and all(torch.equal(p, q) for p, q in zip(weights, other_weights, strict=True))


def assert_resumes_exactly(train, tmp_path, **options):
    """From every checkpoint of a run over several passes. Returns the uninterrupted run's steps and the steps resumed from."""
    whole = train(**options)
    assert sorted(whole) == list(range(1, STEPS + 1))
    assert max(step[2] for step in whole.values()) > 2, "the run has too few passes"
    saved = [step for step in checkpoints(tmp_path) if step < STEPS]
    for start in saved:
        resumed = train(start, min(start + AHEAD, STEPS), **options | {"save_strategy": "no"})
        assert sorted(resumed) == list(range(start + 1, min(start + AHEAD, STEPS) + 1))
        wrong = [step for step in resumed if not same(resumed[step], whole[step])]
        assert not wrong, f"resumed from checkpoint-{start}, steps {wrong} differ"
    return whole, saved


NOISE = {"neftune_noise_alpha": 5.0}  # random numbers in every batch


@pytest.mark.parametrize(
    "options",
    [
        {"rows": 6},  # 3 batches in a pass
        {"rows": 5, "shuffle": True} | NOISE,  # the last batch has one row
        {"rows": 8, "gradient_accumulation_steps": 2},  # 2 steps in a pass
        {"rows": 5, "gradient_accumulation_steps": 2, "shuffle": True} | NOISE,  # 1 step in a pass, and a batch of the next pass's
        {"rows": 4, "shards": 2, "dataloader_num_workers": 2, "shuffle": True},
        {"rows": 6, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2},
        {"rows": 6, "packing": True, "max_length": 400, "shuffle": True},
        {"rows": 10, "packing": True, "max_length": 400, "gradient_accumulation_steps": 2, "para_prob": 0.5},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_from_every_checkpoint(train, tmp_path, options, monkeypatch):
    said = []
    monkeypatch.setattr(reliability.logger, "warning", lambda text, *args, **kwargs: said.append(text))
    _, saved = assert_resumes_exactly(train, tmp_path, **options)
    assert saved == list(range(1, STEPS))
    assert not said
