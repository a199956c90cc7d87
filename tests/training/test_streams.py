"""A stream is resumed where it was, in whichever pass: from each checkpoint on, losses and weights are the uninterrupted run's."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerState

from tests.support.models import tiny_model
from tests.training.test_interruption import two_ranks
from trl_miso import MISOSFTTrainer
from trl_miso.training import reliability
from trl_miso.training.streams import position

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
        {"rows": 5, "gradient_accumulation_steps": 2, "shuffle": True}
        | NOISE,  # 1 step in a pass, and a batch of the next pass's
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


@pytest.mark.parametrize("options", [{"rows": 6} | NOISE, {"rows": 5, "gradient_accumulation_steps": 2} | NOISE])
def test_from_the_end_of_a_pass(train, tmp_path, options):
    """Saved after an evaluation that is not made again; or with batches that belong to the next step, which are."""
    options = options | {"save_strategy": "epoch", "eval_strategy": "epoch"}
    whole, saved = assert_resumes_exactly(train, tmp_path, **options)
    last_of_pass = [step for step in range(1, STEPS) if int(whole[step][2]) < int(whole[step + 1][2])]
    assert [step for step in saved if whole[step][2] % 1] == last_of_pass


@pytest.mark.parametrize("planned", [2, 4, 5])  # in the first pass, all of it, in the second
def test_more_steps_than_the_checkpoint_planned(train, tmp_path, planned):
    options = {"rows": 8, "lr_scheduler_type": "constant"}
    whole = train(**options)
    train(max_steps=planned, **options)
    resumed = train(planned, **options)
    assert sorted(resumed) == list(range(planned + 1, STEPS + 1))
    assert all(same(resumed[step], whole[step]) for step in resumed)


class Reading(MISOSFTTrainer):
    """Notes each training batch."""

    read: list = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.read.append(inputs["input_ids"].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_ignore_data_skip_begins_the_pass_anew(train, monkeypatch):
    """As with other datasets: the pass is that of the checkpoint, with its order, and none of its batches is skipped."""
    options = {"rows": 6, "shuffle": True, "trainer_class": Reading}
    monkeypatch.setattr(Reading, "read", [])
    whole = train(**options)
    passes = [Reading.read[:3], Reading.read[3:6]]
    assert passes[0] != passes[1] and 1 < whole[5][2] < 2
    monkeypatch.setattr(Reading, "read", [])
    resumed = train(5, ignore_data_skip=True, **options)
    assert Reading.read == passes[1][:2]
    assert [step[2] for step in resumed.values()] == [1 + 1 / STEPS, 1 + 2 / STEPS]


@pytest.mark.parametrize("max_steps", [1, 3, 7, 1000, 123_457])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_epoch_of_a_checkpoint_tells_pass_and_step(max_steps, accumulation):
    """Whatever their number; a whole epoch is the end of a pass, or of a run that was one pass."""
    for passes in (0, 1, 2, 10_000):
        for steps in {1, 2, max_steps // 2, max_steps - 1} & set(range(1, max_steps)):
            epoch = passes + steps * accumulation / (max_steps * accumulation)
            saved = TrainerState(epoch=epoch, global_step=steps, max_steps=max_steps)
            assert position(saved) == (passes, steps)
        ended = TrainerState(epoch=float(passes), global_step=max_steps - 1, max_steps=max_steps)
        assert position(ended) == (passes, 0)
    assert position(TrainerState(epoch=1.0, global_step=max_steps, max_steps=max_steps)) == (0, max_steps)


def test_on_two_ranks(tmp_path):
    """Each rank takes its rows from the whole stream, also in a later pass."""
    for whole, resumed in two_ranks("resumed_stream", tmp_path):
        assert [step for step, *_ in whole] == list(range(1, STEPS + 1)) and whole[4][1] > 1
        assert resumed == whole[5:]
