"""Training on several processes equals training on one, step by step: DDP, FSDP2, DeepSpeed ZeRO-2 and ZeRO-3, on CPUs."""

import importlib.util
import json
from collections import Counter

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM

from tests.support.distributed_script import COLUMNS, OPTIONS, run
from tests.support.models import tiny_model
from tests.support.processes import REPOSITORY, run_python
from trl_miso import MISOSFTConfig, MISOSFTTrainer
from trl_miso.attention import register_miso_attention
from trl_miso.attention.support import prepare_model
from trl_miso.data.collator import MISODataCollator

CONFIGS = REPOSITORY / "trl_miso" / "recipes" / "accelerate"
SCRIPT = REPOSITORY / "tests" / "support" / "distributed_script.py"
CPU = {"use_cpu": True}
DEEPSPEED = {"ddp_backend": "gloo"}  # with use_cpu accelerate would use DDP, and without a backend a single process
SAVED = {"save_strategy": "steps", "save_steps": 10}
LORA = {"lora": True, "max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
REENTRANT = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "ddp_find_unused_parameters": False,  # transformers sets it for adapters, and torch cannot combine it with reentrant checkpointing
}
# Ways for two processes to do what one does in a batch of 4: 2 x 2, 2 x 1 accumulated twice, or a split batch of 4.
STEPS = {
    "batch": {"max_steps": 20, "per_device_train_batch_size": 2},
    "accumulated": {"max_steps": 20, "gradient_accumulation_steps": 2},
    "split": {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "accelerator_config": {"split_batches": True},
    },
}
# Rows that fill neither the last batch nor the last step: 13 rows, one very long and one with a single label; 3 rows; bins.
UNEVEN = {
    "uneven": {"rows": "uneven", "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "few": {"rows": "few", "max_steps": 2, "per_device_train_batch_size": 4},
    "packed": {"rows": "uneven", "packing": True, "max_steps": 6, "per_device_train_batch_size": 1},
    "stream": {"rows": "uneven", "shards": 1, "max_steps": 8, "per_device_train_batch_size": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, para_dataset, tokenizer):
    """The model, the tokenizer and prepared rows on disk."""
    folder = tmp_path_factory.mktemp("distributed")
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    long = para_dataset[min(range(64), key=lambda i: len(str(para_dataset[i]["prompt"])))] | {
        "completion": [{"role": "assistant", "content": "stone and reed " * 400}]
    }
    dataset = Dataset.from_list([*para_dataset, long], features=para_dataset.features)
    config = MISOSFTConfig(str(folder), **OPTIONS | CPU)
    trainer = MISOSFTTrainer(tiny_model("llama"), config, train_dataset=dataset, processing_class=tokenizer)
    *rows, giant = trainer.train_dataset.select_columns(list(COLUMNS)).to_list()
    shortest, *small = sorted(rows, key=lambda row: len(row["input_ids"]))[:12]
    single = shortest | {"labels": [-100] * (len(shortest["labels"]) - 1) + shortest["labels"][-1:]}
    sets = {"rows": rows, "uneven": [*small[:5], giant, *small[5:], single], "few": rows[:3]}
    for name, members in sets.items():
        Dataset.from_list(members).save_to_disk(folder / name)
    assert len(rows) == 64 and len(sets["uneven"]) == 13
    assert len(giant["labels"]) > 2 * max(len(row["labels"]) for row in small)
    return folder


def _launch(folder, name, launcher, scenarios, **environment):
    """Launch two ranks; return the results of each scenario, one per rank."""
    (folder / f"{name}.json").write_text(json.dumps(scenarios))
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"PET_START_METHOD": "fork", "PET_RUN_PATH": "1"}  # ranks are forked too: torchrun's own options
    run_python("-m", *launcher, SCRIPT, folder, name, cwd=folder, timeout=240, **environment)
    return {s: [torch.load(folder / f"{name}-{s}-{rank}.pt") for rank in range(2)] for s in scenarios}


def _accelerate(name):
    options = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    return ["accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml"), *options]


@pytest.fixture(scope="module")
def one(folder):
    """Results of 20 steps in one process."""
    return run(folder, keep="one", max_steps=20, per_device_train_batch_size=4, **CPU)


@pytest.fixture(scope="module")
def ddp(folder):
    checkpointed = {"lora": LORA | {"gradient_checkpointing": True}, "lora-reentrant": LORA | REENTRANT}
    scenarios = STEPS | UNEVEN | checkpointed
    scenarios["batch"] = scenarios["batch"] | {"keep": "ddp"}
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return _launch(folder, "ddp", launcher, {name: options | CPU for name, options in scenarios.items()})


@pytest.fixture(scope="module", params=["fsdp2", "zero2", "zero3"])
def sharded(request, folder):
    """(name of the launch, results of an uninterrupted run and of a run resumed from its middle)"""
    name = request.param
    if name != "fsdp2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: pip install 'trl-miso[deepspeed]'")
    steps = STEPS["accumulated"] | SAVED | {"gradient_checkpointing": True} | (CPU if name == "fsdp2" else DEEPSPEED)
    scenarios = {
        "whole": steps | {"keep": name},
        "resumed": steps | {"keep": f"{name}-resumed", "resume_from_checkpoint": f"{name}/checkpoint-10"},
    }
    return name, _launch(folder, name, _accelerate(name), scenarios, DS_ACCELERATOR="cpu")


def _losses(result):
    return torch.tensor(result["losses"])


def _same(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def _same_weights(folder, got, expected):
    models = (AutoModelForCausalLM.from_pretrained(folder / name) for name in (got, expected))
    got, expected = (dict(model.named_parameters()) for model in models)
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def _key(row):
    return (*row["input_ids"], *row["labels"])


def _rows(result, steps=slice(None)):
    """Hashable keys of the rows that a rank saw, in order."""
    return [_key(row) for step in result["steps"][steps] for batch in step for row in batch]


def test_accumulation_is_per_labelled_token(folder, one):
    """One process that accumulates four batches of one row."""
    got = run(folder, max_steps=20, gradient_accumulation_steps=4, **CPU)
    assert Counter(_rows(got)) == Counter(_rows(one))
    _same(_losses(got), _losses(one))


@pytest.mark.parametrize("scenario", STEPS)
def test_two_ranks_equal_one(one, ddp, scenario):
    first, second = ddp[scenario]
    steps = slice(STEPS[scenario]["max_steps"])
    assert len(one["losses"]) == 20 and one["losses"][-1] < one["losses"][0] - 0.5
    assert Counter(_rows(first) + _rows(second)) == Counter(_rows(one, steps))
    assert len(_rows(first)) == len(_rows(second))
    _same(_losses(first), _losses(one)[steps])


def test_two_ranks_end_with_the_weights_of_one(folder, one, ddp):
    _same_weights(folder, "ddp", "one")


def test_sharded_equals_one(folder, one, sharded):
    """The loss of every step is the same, and `save_model` leaves an ordinary checkpoint with the same weights."""
    name, results = sharded
    first, second = results["whole"]
    assert first["held"] == 1 if name == "zero2" else 0.4 < first["held"] < 0.6
    assert Counter(_rows(first) + _rows(second)) == Counter(_rows(one))
    _same(_losses(first), _losses(one))
    _same_weights(folder, name, "one")


def test_resumed_equals_uninterrupted(folder, one, sharded):
    name, results = sharded
    resumed = _losses(results["resumed"][0])
    assert len(resumed) == 20  # the first ten from the checkpoint's history
    _same(resumed, _losses(one))
    _same_weights(folder, f"{name}-resumed", "one")


def test_every_batch_calls_the_same_modules(folder):
    """ZeRO-3 gathers weights in the order of the modules' calls: ranks with different orders would wait for each other forever."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").train()
    prepare_model(model, register_miso_attention("sdpa", "cpu"), OPTIONS["max_length"])
    calls = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
    orders = {}
    for row in load_from_disk(folder / "rows").select(range(24)):
        calls.clear()
        batch = MISODataCollator(0)([row])
        model(**batch, use_cache=False).logits.sum().backward()
        orders.setdefault((batch["miso_num_mixed"], "miso_branch_kv_offset" in batch), []).append(tuple(calls))
    assert len(orders) > 1, "the rows must differ in how they are attended to"
    assert len({order for of_kind in orders.values() for order in of_kind}) == 1


def _replay(folder, ranks):
    """Losses of a hand-written training loop over the rows that the ranks saw, with one sum over all rows of a step."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").train()
    prepare_model(model, register_miso_attention("sdpa", "cpu"), OPTIONS["max_length"])
    collate = MISODataCollator(0, share_prefixes=False)
    optimizer = torch.optim.AdamW(
        model.parameters(), OPTIONS["learning_rate"], eps=OPTIONS["adam_epsilon"], weight_decay=0.0
    )
    losses = []
    for step in zip(*(rank["steps"] for rank in ranks), strict=True):
        total, count = torch.zeros(()), 0
        for batch in (batch for of_rank in step for batch in of_rank):
            inputs = collate(batch)
            labels = inputs.pop("labels")[0, 1:]
            logits = model(**inputs, use_cache=False).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("scenario", UNEVEN)
def test_uneven_rows(folder, ddp, scenario):
    """All ranks have the same number of batches, no row is left out, and the loss of a step is the mean over all of its labels."""
    ranks = ddp[scenario]
    shapes = [[[len(batch) for batch in step] for step in rank["steps"]] for rank in ranks]
    assert shapes[0] == shapes[1]
    everything = {_key(row) for row in ranks[0]["rows"]}
    at_once = (
        2 * UNEVEN[scenario]["per_device_train_batch_size"] * UNEVEN[scenario].get("gradient_accumulation_steps", 1)
    )
    epoch = -(-len(everything) // at_once)
    assert len(shapes[0]) >= 2 * epoch and len(shapes[0]) % epoch == 0
    for start in range(0, len(shapes[0]), epoch):
        seen = [row for rank in ranks for row in _rows(rank, slice(start, start + epoch))]
        assert set(seen) == everything and len(seen) == epoch * at_once
    _same(_losses(ranks[0]), _losses(ranks[1]))
    _same(_losses(ranks[0]), _replay(folder, ranks), 2e-5)


def test_lora(folder, ddp):
    one = run(folder, **LORA | CPU | {"per_device_train_batch_size": 4})
    assert one["losses"][-1] < one["losses"][0]
    for scenario in ("lora", "lora-reentrant"):
        _same(_losses(ddp[scenario][0]), _losses(one))


def _launched(path, *options):
    """Read a config file as accelerate does, which raises on unknown keys."""
    load_config_from_file(str(path))
    arguments = launch_command_parser().parse_args(["--config_file", str(path), *options, "train.py"])
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configs(path):
    """The launcher knows every field of the engine's section, and takes its value."""
    config, launched = load_config_from_file(str(path)), _launched(path)
    section = config.fsdp_config | config.deepspeed_config
    assert section == {name: getattr(launched, name) for name in section}
    assert section.keys() <= vars(launch_command_parser().parse_args(["train.py"])).keys()
    assert bool(config.fsdp_config) == launched.use_fsdp and bool(config.deepspeed_config) == launched.use_deepspeed
    assert launched.multi_gpu == (path.stem == "ddp") and launched.mixed_precision == "bf16"
    assert launched.num_processes == {"single_gpu": 1, "multi_node": 16}.get(path.stem, 8)
    assert launched.gpu_ids == ("0" if path.stem == "single_gpu" else "all")


def test_multi_node_is_fsdp2_with_a_rank_and_an_address():
    configs = [load_config_from_file(str(CONFIGS / f"{name}.yaml")) for name in ("fsdp2", "multi_node")]
    assert configs[0].fsdp_config == configs[1].fsdp_config
    rest = "--machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29511 --num_machines 4 --num_processes 32"
    launched = _launched(CONFIGS / "multi_node.yaml", *rest.split())
    environment = prepare_multi_gpu_env(launched)
    assert (launched.nnodes, launched.node_rank, launched.nproc_per_node) == ("4", 1, "8")
    assert (launched.rdzv_backend, launched.rdzv_endpoint) == ("static", "10.0.0.1:29511")
    assert environment["FSDP_VERSION"] == "2" and environment["ACCELERATE_USE_FSDP"] == "true"


def test_fsdp2_wraps_the_layers_that_the_model_names(monkeypatch):
    """accelerate's plugin for fsdp2.yaml shards the right modules and saves full state dicts."""
    environment = prepare_multi_gpu_env(_launched(CONFIGS / "fsdp2.yaml", "--main_process_port", "0"))
    for name in [name for name in environment if name.startswith("FSDP_")]:
        monkeypatch.setenv(name, environment[name])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not plugin.activation_checkpointing and plugin.reshard_after_forward and plugin.cpu_ram_efficient_loading
    for model in map(tiny_model, ("llama", "qwen3", "gemma3")):
        wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
        wrapped = [module for module in model.modules() if wraps(module)]
        assert wrapped == list(model.model.layers)
