"""A run that resumes with other settings than its checkpoint's is told each that changes the weights, and no other."""

import dataclasses
import json
import re

import pytest

from tests.support.models import tiny_model
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.training import reliability
from trl_miso.training.kept_settings import SETTINGS_FILE, changed_settings

# For each setting a value that is not the first run's.
CHANGED = {
    "context_mode": "succ",
    "context_weighting": "fid",
    "full_context_weight": 0.4,
    "para_prob": 0.5,
    "seed": 7,
    "eos_token": "<|user|>",
    "chunk_probs": [0.5, 0.5],
    "train_turns": "last",
    "output_positions": "after_longest",
    "include_bare": False,
    "data_seed": 8,
    "max_length": 300,
    "packing": True,
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "max_grad_norm": 0.5,
    "neftune_noise_alpha": 5.0,
    "optim": "adamw_torch",
}
NEEDS = {"chunk_probs": {"context_mode": "succ"}}  # refused without
# Settings whose change leaves the weights as they were, except by rounding.
WITHOUT_EFFECT = {
    "logging_steps": 2,
    "save_total_limit": 3,
    "eval_contexts": "miso",
    "log_shares": False,
    "run_name": "again",
    "share_prefixes": False,
    "attention_kernel": "reference",
    "dataloader_num_workers": 1,
    "verify": True,
}


@pytest.fixture
def make(tokenizer, para_dataset, make_config):
    def make(stream=False, **options):
        options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 1} | options
        rows = para_dataset.select(range(4))
        return MISOSFTTrainer(
            tiny_model("llama", vocab_size=len(tokenizer)),
            make_config(**options),
            train_dataset=rows.to_iterable_dataset() if stream else rows,
            processing_class=tokenizer,
        )

    return make


@pytest.fixture
def said(monkeypatch):
    """The warnings on settings."""
    texts = []
    monkeypatch.setattr(reliability.logger, "warning", lambda text, *args, **kwargs: texts.append(text))
    return texts


def named(text):
    """The settings that a warning names, with (the present value, the checkpoint's)."""
    return {name: values for name, *values in re.findall(r"(\w+) is (.+?), in the checkpoint (.+?)(?=; |\. Fix)", text)}


def test_every_change_of_the_result_is_named_with_both_values(make, tmp_path):
    make().train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    first = make().result_settings()
    for name, value in CHANGED.items():
        options = {name: value} | NEEDS.get(name, {})
        expected = {name: [repr(value), repr(first[name])] for name, value in options.items()}
        trainer = make(**options)
        if "context_mode" in options:
            expected["training_mode"] = ["'succ'", "'para'"]
        assert named(changed_settings(checkpoint, trainer.result_settings())) == expected
    for name, value in WITHOUT_EFFECT.items():
        assert changed_settings(checkpoint, make(**{name: value}).result_settings()) == ""


def test_every_setting_of_miso_is_compared_or_without_effect(make):
    compared = set(make().result_settings())
    own = {field.name for field in dataclasses.fields(MISOSFTConfig)} & set(MISOSFTConfig.__annotations__)
    assert own - compared == set(WITHOUT_EFFECT) & own


def test_one_warning_when_training_resumes(make, said, tmp_path):
    make().train()
    changed = {"para_prob": 0.5, "seed": 7, "lr_scheduler_type": "cosine"}
    make(**changed | {"max_steps": 3}).train(resume_from_checkpoint=True)
    (text,) = said
    assert set(named(text)) == {*changed, "max_steps"}
    assert "checkpoint-2" in text and text.endswith("Fix, unless this is meant: give the checkpoint's settings.")
    # The checkpoint that this run saved has its settings, and is whole with them.
    said.clear()
    sizes = json.loads((tmp_path / "out" / "checkpoint-3" / "miso_files.json").read_text())
    assert SETTINGS_FILE in sizes
    make(**changed | {"max_steps": 3}).train(resume_from_checkpoint=True)
    assert not said


def test_the_order_of_a_stream_depends_on_its_data_workers(make, said):
    make(stream=True).train()
    make(stream=True, dataloader_num_workers=1).train(resume_from_checkpoint=True)
    assert [named(text) for text in said] == [{"dataloader_num_workers": ["1", "0"]}]


def test_earlier_checkpoints_resume_without_a_word(make, said, tmp_path):
    make().train()
    folder = tmp_path / "out" / "checkpoint-1"
    sizes = json.loads((folder / "miso_files.json").read_text())
    del sizes[SETTINGS_FILE]
    (folder / "miso_files.json").write_text(json.dumps(sizes))
    (folder / SETTINGS_FILE).unlink()
    trainer = make(seed=7)
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 2 and not said
