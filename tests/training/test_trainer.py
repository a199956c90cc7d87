"""MISOSFTTrainer: equal to SFTTrainer in single mode and in its settings, and MISO in the other modes."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tests.support.models import tiny_model
from tests.support.processes import run_python
from trl_miso import MISOSFTConfig, MISOSFTTrainer


def _losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _plain(rows, kind):
    """The synthetic rows in a format of SFTTrainer."""
    if kind == "messages":
        return Dataset.from_list([{"messages": row["messages"]} for row in rows])
    if kind == "text":
        return Dataset.from_list([{"text": row["messages"][-1]["content"]} for row in rows])
    if kind == "prompt-completion text":
        texts = [[message["content"] for message in row["messages"][-2:]] for row in rows]
        return Dataset.from_list([{"prompt": prompt, "completion": " " + answer} for prompt, answer in texts])
    return Dataset.from_list([{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("prompt-completion", {}),
        ("prompt-completion", {"completion_only_loss": False}),
        ("prompt-completion", {"packing": True, "max_length": 512}),
        ("prompt-completion text", {}),
        ("messages", {}),
        ("messages", {"assistant_only_loss": True, "max_length": 64}),
        ("text", {}),
    ],
)
def test_single_mode_equals_sft_trainer(crab_rows, tokenizer, make_config, kind, options):
    """The same tokens and labels, and the same loss in every one of 20 steps."""
    dataset = _plain(crab_rows, kind)
    options = {"max_steps": 20, "per_device_train_batch_size": 2} | options
    trainers = []
    for trainer_class, config in (
        (SFTTrainer, make_config(SFTConfig, **options)),
        (MISOSFTTrainer, make_config(context_mode="single", **options)),
    ):
        trainers.append(trainer_class(tiny_model("llama"), config, train_dataset=dataset, processing_class=tokenizer))
    theirs, ours = trainers
    if not options.get("packing"):
        assert ours.train_dataset["input_ids"] == theirs.train_dataset["input_ids"]
        assert ours.train_dataset["labels"] == theirs.train_dataset["labels"]
    expected = _losses(theirs)
    assert len(expected) == 20 and expected[-1] < expected[0]
    if options.get("packing"):  # the order of bins differs
        assert sorted(len(ids) for ids in ours.train_dataset["input_ids"]) == sorted(
            len(ids) for ids in theirs.train_dataset["input_ids"]
        )
        return
    torch.testing.assert_close(torch.tensor(_losses(ours)), torch.tensor(expected), rtol=0, atol=1e-5)
    for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert (p - q).norm() <= 1e-4 * q.norm(), name


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("mode", ["para", "succ", "augment", "single"])
def test_every_mode_trains_every_parameter(para_dataset, tokenizer, make_config, mode, packing):
    model = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"chunk_probs": [0.2, 0.4, 0.4]} if mode == "succ" else {}
    config = make_config(context_mode=mode, packing=packing, max_steps=8, **options)
    trainer = MISOSFTTrainer(model, config, train_dataset=para_dataset, processing_class=tokenizer)
    losses = _losses(trainer)
    assert losses[-1] < losses[0]
    for name, p in trainer.model.named_parameters():
        assert not torch.equal(p, before[name]), f"{name} has not changed"
    shares = [entry["multi_context_share"] for entry in trainer.state.log_history if "multi_context_share" in entry]
    assert (max(shares) > 0) == (mode in ("para", "succ"))


def test_packing_holds_whole_examples(para_dataset, tokenizer, make_config):
    """One step over the whole dataset has the same loss with bins as without."""
    losses = []
    for packing in (False, True):
        config = make_config(max_steps=1, per_device_train_batch_size=64, packing=packing, max_length=600)
        trainer = MISOSFTTrainer(tiny_model("llama"), config, train_dataset=para_dataset, processing_class=tokenizer)
        assert (len(trainer.train_dataset) < len(para_dataset)) == packing
        losses += _losses(trainer)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "fid", "vanilla"])
def test_sharing_and_kernels_do_not_change_training(para_dataset, tokenizer, make_config, weighting):
    trajectories = []
    for options in ({}, {"share_prefixes": False}, {"attention_kernel": "reference"}, {"gradient_checkpointing": True}):
        config = make_config(max_steps=4, per_device_train_batch_size=2, context_weighting=weighting, **options)
        trainer = MISOSFTTrainer(tiny_model("llama"), config, train_dataset=para_dataset, processing_class=tokenizer)
        trajectories.append(torch.tensor(_losses(trainer)))
    for trajectory in trajectories[1:]:
        torch.testing.assert_close(trajectory, trajectories[0], rtol=0, atol=1e-4)


def test_evaluation_is_standard_inference_by_default(para_dataset, tokenizer, make_config):
    """eval_loss equals that of the plain model with its own attention, on the full prompt alone."""
    results = {}
    for eval_contexts in ("standard", "miso"):
        config = make_config(eval_contexts=eval_contexts, per_device_eval_batch_size=64, max_length=512)
        trainer = MISOSFTTrainer(
            tiny_model("llama"),
            config,
            train_dataset=para_dataset,
            eval_dataset=para_dataset,
            processing_class=tokenizer,
        )
        results[eval_contexts] = trainer.evaluate()
    model, total, count = tiny_model("llama").eval(), 0.0, 0
    for row in para_dataset:
        prompt = tokenizer.apply_chat_template(row["full_prompt"], add_generation_prompt=True)["input_ids"]
        ids = tokenizer.apply_chat_template(row["full_prompt"] + row["completion"])["input_ids"][:512]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(log_probs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
        count += max(len(ids) - len(prompt), 0)
    assert results["standard"]["eval_loss"] == pytest.approx(total / count, abs=1e-4)
    assert results["standard"]["eval_multi_context_share"] == 0
    assert abs(results["miso"]["eval_loss"] - total / count) > 1e-3
    assert results["miso"]["eval_multi_context_share"] > 0.5


@pytest.mark.parametrize("kind", ["prompt-completion", "messages", "text"])
def test_standard_evaluation_needs_no_constraints(crab_rows, para_dataset, tokenizer, make_config, kind):
    """Train on para rows and evaluate on rows of another format, with the loss on the output."""
    dataset = _plain(crab_rows, kind)
    config = make_config(context_mode="para", eval_strategy="steps", eval_steps=1)
    trainer = MISOSFTTrainer(
        tiny_model("llama"),
        config,
        train_dataset=para_dataset,
        eval_dataset={"train": dataset, "other": dataset.select(range(8))},
        processing_class=tokenizer,
    )
    trainer.train()
    assert {"eval_train_loss", "eval_other_loss"} <= set().union(*trainer.state.log_history)
    rows = trainer.eval_dataset["other"]
    assert all((-100 in labels) == (kind != "text") for labels in rows["labels"])


def test_evaluate_takes_a_fresh_raw_dataset(para_dataset, tokenizer, make_config):
    trainer = MISOSFTTrainer(tiny_model("llama"), make_config(), train_dataset=para_dataset, processing_class=tokenizer)
    assert trainer.evaluate(para_dataset.select(range(8)))["eval_loss"] > 0


def test_signature_is_that_of_sft_trainer():
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (MISOSFTTrainer, SFTTrainer))
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@pytest.mark.parametrize("config_class", [SFTConfig, TrainingArguments, None])
def test_other_arguments_are_converted(para_dataset, tokenizer, make_config, config_class, monkeypatch, tmp_path):
    if config_class is None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(
            MISOSFTConfig, "__post_init__", lambda self: setattr(self, "bf16", False) or SFTConfig.__post_init__(self)
        )
        args = None
        model = tiny_model("llama")
        model.config._name_or_path = "someone/tiny"
    else:
        args, model = make_config(config_class, learning_rate=0.5, hub_token="secret"), tiny_model("llama")
    trainer = MISOSFTTrainer(model, args, train_dataset=para_dataset, processing_class=tokenizer)
    assert isinstance(trainer.args, MISOSFTConfig) and trainer.args.context_mode == "auto"
    if args is None:
        assert trainer.args.output_dir == "tiny-MISO"
    else:
        assert trainer.args.learning_rate == 0.5 and trainer.args.hub_token == "secret"


def test_streaming(para_dataset, tokenizer, make_config):
    """An IterableDataset trains as a Dataset does, packed or not."""
    for packing in (False, True):
        losses = []
        for dataset in (para_dataset, para_dataset.to_iterable_dataset()):
            config = make_config(
                max_steps=3, per_device_train_batch_size=2, packing=packing, train_sampling_strategy="sequential"
            )
            trainer = MISOSFTTrainer(tiny_model("llama"), config, train_dataset=dataset, processing_class=tokenizer)
            losses.append(torch.tensor(_losses(trainer)))
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"neftune_noise_alpha": 5.0},
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.1},
        {"dataloader_num_workers": 1},
        {"dataset_num_proc": 2},
        {"pad_to_multiple_of": 64},
        {"train_sampling_strategy": "group_by_length"},
        {"include_num_input_tokens_seen": True},
        {"torch_empty_cache_steps": 1},
        {"bf16": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_settings_of_sft_trainer_work(para_dataset, tokenizer, make_config, options):
    config = make_config(max_steps=6, **options)
    losses = _losses(
        MISOSFTTrainer(tiny_model("llama"), config, train_dataset=para_dataset, processing_class=tokenizer)
    )
    if "loss_type" in options:  # dft is -p log p, which rises while p is small
        assert 0 < losses[0] < losses[-1]
    else:
        assert losses[-1] < losses[0]


def test_resume_equals_an_uninterrupted_run(para_dataset, tokenizer, make_config, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "para_prob": 0.5}
    runs = []
    for resume in (None, str(tmp_path / "out" / "checkpoint-3")):
        trainer = MISOSFTTrainer(
            tiny_model("llama"), make_config(**options), train_dataset=para_dataset, processing_class=tokenizer
        )
        trainer.train(resume_from_checkpoint=resume)
        runs.append(trainer)
    for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(p, q)


def _run(code, *arguments, **environment):
    environment = (
        os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_saved_model_needs_no_trl_miso(para_dataset, tokenizer, make_config, tmp_path):
    trainer = MISOSFTTrainer(tiny_model("llama"), make_config(), train_dataset=para_dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    card = trainer.create_model_card()
    assert card is None and "miso" in (tmp_path / "out" / "README.md").read_text()
    assert "miso" not in (tmp_path / "model" / "config.json").read_text()
    prompt = [{"role": "user", "content": "Write about the river."}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    # In this process generation uses the registered attention, without metadata.
    expected = trainer.model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
    code = """
import sys
sys.modules["trl_miso"] = None  # importing it raises
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
prompt = [{"role": "user", "content": "Write about the river."}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist())
"""
    assert _run(code, tmp_path / "model").strip().splitlines()[-1] == str(expected)


def test_trl_example_script_with_the_class_swapped(para_dataset, tokenizer, tmp_path):
    """TRL's own SFT script trains when only the import and the class name are changed."""
    script = Path(trl.__file__).parent.joinpath("scripts", "sft.py").read_text()
    swapped = script.replace(
        "from trl import SFTTrainer, ", "from trl_miso import MISOSFTTrainer\n    from trl import "
    )
    swapped = swapped.replace("trainer = SFTTrainer(", "trainer = MISOSFTTrainer(")
    assert swapped.count("MISOSFTTrainer") == 2 and script.count("SFTTrainer(") == 1
    (tmp_path / "sft.py").write_text(swapped)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    para_dataset.select_columns(["prompt", "constraints", "completion"]).to_json(tmp_path / "data" / "train.jsonl")
    arguments = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": "false",
        "use_cpu": "true",
    }
    options = [part for key, value in arguments.items() for part in (f"--{key}", value)]
    assert "multi_context_share" in "".join(run_python(tmp_path / "sft.py", *options, cwd=tmp_path))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_fewer_batches_than_accumulation_steps(para_dataset, tokenizer, make_config):
    """transformers would read a stream that never fills a step forever."""
    config = make_config(gradient_accumulation_steps=8, per_device_train_batch_size=1, max_steps=1)
    stream = para_dataset.select(range(3)).to_iterable_dataset()
    trainer = MISOSFTTrainer(tiny_model("llama"), config, train_dataset=stream, processing_class=tokenizer)
    with pytest.raises(ValueError, match="Got fewer batches .* than gradient_accumulation_steps=8"):
        trainer.train()
