"""NEFTune's noise has the size that it has in a row of its own, whatever shares a batch with the row."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from trl import SFTConfig, SFTTrainer

from tests.attention.test_attention import examples
from tests.support.models import tiny_model
from trl_miso import MISOSFTTrainer
from trl_miso.segments.packed import pack
from trl_miso.training.neftune import row_lengths

ALPHA = 5.0


@settings(max_examples=100, deadline=None)
@given(batch=examples())
def test_lengths_are_those_of_the_rows(batch):
    """Against the tree of segments: of every context with its output, and of every single run."""
    expected = []
    for example in batch:
        lengths = [0] * len(example.segments)
        paths = [example.path(i) for i in range(len(example.segments))]
        size = [segment.length for segment in example.segments]
        for path in paths:
            for segment in path:
                lengths[segment] = max(lengths[segment], sum(size[i] for i in path))
        for output in example.outputs:
            for branch in output.branches:
                path = [*example.path(branch.segment), output.segment]
                for segment in path:
                    lengths[segment] = max(lengths[segment], sum(size[i] for i in path))
        expected += [length for i, length in enumerate(lengths) for _ in range(size[i])]
    order, _, packed = pack(batch, "uniform")
    got = row_lengths(packed, len(order))
    assert got.tolist() == torch.tensor(expected)[torch.from_numpy(order)].tolist()


def _noise(trainer):
    """Largest noise of each token in the first training batch."""
    weights = trainer.model.get_input_embeddings().weight.detach().clone()
    ids, noisy = [], []
    hooks = [
        trainer.model.get_input_embeddings().register_forward_pre_hook(lambda module, args: ids.append(args[0])),
        trainer.model.model.layers[0].register_forward_pre_hook(lambda module, args: noisy.append(args[0].detach())),
    ]
    trainer.train()
    for hook in hooks:
        hook.remove()
    return (noisy[0] - weights[ids[0]])[0].abs().amax(-1)


def _rows(lengths):
    return Dataset.from_list([{"input_ids": [5 + i % 20 for i in range(n)], "labels": [6] * n} for n in lengths])


@pytest.mark.parametrize("lengths", [[40], [160]])
def test_a_row_alone_has_the_noise_of_sft_trainer(make_config, tokenizer, lengths):
    """The same random numbers of the same size: the losses of three steps are equal."""
    losses = []
    options = {"neftune_noise_alpha": ALPHA, "per_device_train_batch_size": 1, "max_steps": 3, "logging_steps": 1}
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    config = make_config(context_mode="single", **options, **skip)
    for trainer_class in (MISOSFTTrainer, SFTTrainer):
        args = config
        if trainer_class is SFTTrainer:
            values = {
                name: getattr(config, name)
                for name in SFTConfig.__dataclass_fields__
                if SFTConfig.__dataclass_fields__[name].init
            }
            args = SFTConfig(**values)
        trainer = trainer_class(tiny_model("llama"), args, train_dataset=_rows(lengths * 3), processing_class=tokenizer)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_noise_of_a_batch_of_several_rows(make_config, tokenizer):
    """Bounded by each row's own length, and near the bound: the largest of 64 uniform numbers or more."""
    lengths = [20, 90, 150, 35]
    options = {"neftune_noise_alpha": ALPHA, "per_device_train_batch_size": 4, "max_steps": 1}
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}, "train_sampling_strategy": "sequential"}
    config = make_config(context_mode="single", **options, **skip)
    trainer = MISOSFTTrainer(tiny_model("llama"), config, train_dataset=_rows(lengths), processing_class=tokenizer)
    noise = _noise(trainer)
    size = trainer.model.config.hidden_size
    for part, n in zip(noise.split(lengths), lengths, strict=True):
        bound = ALPHA / (n * size) ** 0.5
        assert 0.98 * bound < part.max() <= bound * (1 + 1e-6)


def test_noise_of_contexts(make_config, tokenizer, para_dataset):
    """Each context has the noise of a row with that context and the output, in every batch size."""
    largest = {}
    for batch in (1, 8):
        config = make_config(
            neftune_noise_alpha=ALPHA,
            per_device_train_batch_size=batch,
            max_steps=1,
            train_sampling_strategy="sequential",
        )
        trainer = MISOSFTTrainer(
            tiny_model("llama"), config, train_dataset=para_dataset.select(range(8)), processing_class=tokenizer
        )
        first = next(iter(trainer.get_train_dataloader()))
        packed = {key.removeprefix("miso_"): x for key, x in first.items() if key.startswith("miso_")}
        noise = _noise(trainer)
        start, stop = packed["output_start"], packed["output_end"]
        assert noise[:start].min() > 0 and noise[start:stop].min() > 0
        largest[batch] = float(noise.max())
    assert largest[8] > 0.8 * largest[1]


def test_no_noise_outside_of_training(make_config, tokenizer, para_dataset):
    rows = para_dataset.select(range(8))
    losses = []
    for alpha in (None, ALPHA):
        config = make_config(neftune_noise_alpha=alpha, max_steps=1, learning_rate=0.0)
        trainer = MISOSFTTrainer(
            tiny_model("llama"), config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
        )
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]
    assert not trainer.model.get_input_embeddings()._forward_hooks
