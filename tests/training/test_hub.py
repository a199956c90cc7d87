"""Pushes by the real client to a Hub on loopback (hub_server.py): what arrives, and what happens when a push fails."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import AutoTokenizer, BitsAndBytesConfig

from tests.support.conversations import assistant, user
from tests.support.hub_server import HubServer
from tests.support.models import tiny_model
from trl_miso import MISOSFTTrainer
from trl_miso.training.model_card import count_answers_and_contexts
from trl_miso.verification.checks import Check

REPOSITORY = Path(__file__).parents[2]
TOKEN = "hf_secretOfAna"

# Download the pushed models and load them with the code of their cards, without trl_miso.
LOAD = """
import hashlib, json, re, sys
sys.modules["trl_miso"] = None  # importing it raises
import torch
from huggingface_hub import snapshot_download
from pathlib import Path
results = {}
for name in ("whole", "last_checkpoint"):
    repo = f"ana/{name}"
    folder = Path(snapshot_download(repo))
    files = [path for path in folder.rglob("*") if path.is_file()]
    code = re.search(r"```python\\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    variables = {}
    exec(code.replace("max_new_tokens=256", "max_new_tokens=2"), variables)
    expected = torch.load(f"{sys.argv[1]}/{name}.pt")
    with torch.no_grad():
        got = variables["model"].eval()(torch.arange(5, 25)[None]).logits
    results[name] = {
        "hashes": {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "difference": (got - expected).abs().max().item(),
        "scale": expected.abs().max().item(),
        "repo": repo in code,
        "class": type(variables["model"]).__name__,
    }
print(json.dumps(results))
"""


def _python(hub, folder, *arguments, **environment):
    environment |= os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(folder / "home"),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, *arguments, str(folder)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory, para_dataset, tokenizer):
    folder = tmp_path_factory.mktemp("hub")
    tiny_model("llama").save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    para_dataset.select(range(16)).save_to_disk(folder / "rows")
    return folder


@pytest.fixture(scope="module")
def pushed(folder):
    """(the Hub after all pushes, the results that the pushing process wrote)"""
    with HubServer({TOKEN: "ana"}) as hub:
        _python(hub, folder, "-m", "tests.support.hub_pushes")
        hub.faults = []
        yield hub, json.loads((folder / "results.json").read_text())


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _local(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(("checkpoint-", "_"))
    }


def _header(card):
    return yaml.safe_load(card.split("---")[1])


def test_pushed_models_load_without_trl_miso(pushed, folder):
    """From a private repository and as an adapter: the files on disk, and the same logits by the code of the card."""
    hub, _ = pushed
    results = json.loads(_python(hub, folder, "-c", LOAD, HF_TOKEN=TOKEN).splitlines()[-1])
    classes = {"whole": "LlamaForCausalLM", "last_checkpoint": "PeftModelForCausalLM"}
    for name, got in results.items():
        on_hub = {path: _sha256(data) for path, data in hub.files(f"ana/{name}").items()}
        assert got["hashes"] == on_hub
        local = {path: _sha256(data) for path, data in _local(folder / name).items()}
        assert {path: sha for path, sha in on_hub.items() if not path.startswith("last-checkpoint/")} == local
        assert got["difference"] <= 1e-5 * got["scale"]
        assert got["repo"] and got["class"] == classes[name]
    required = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert required | {"chat_template.jinja", "training_args.bin"} <= set(results["whole"]["hashes"])
    assert "model.safetensors" not in results["last_checkpoint"]["hashes"]
    assert "miso" not in hub.files("ana/whole")["config.json"].decode()
    # verified by this training
    assert "| packing changes nothing | passed |" in hub.files("ana/whole")["README.md"].decode()


def test_repository_revision_and_token_pass_through(pushed):
    hub, results = pushed
    assert {name for name, repository in hub.repositories.items() if repository.private} == {"ana/whole"}
    assert [commit.title for commit in hub.repositories["ana/whole"].branches["main"]][1:] == ["First push"]
    branches = hub.repositories["ana/branch"].branches
    assert [commit.title for commit in branches["dev/1"]] == ["branched", "End of training"]
    assert len(branches["main"]) == 1
    written = [request for request in hub.requests if "/commit/" in request.path or "/create" in request.path]
    assert len(written) > 10 and all(request.token == TOKEN for request in written)
    assert results["whole"]["kept"] == [TOKEN, TOKEN]  # the trainer and copies of its arguments still have it


def test_token_is_in_no_uploaded_file(pushed):
    hub, results = pushed
    names = {path.split("/")[-1] for repo in hub.repositories for path in hub.files(repo)}
    assert {"training_args.bin", "optimizer.pt", "adapter_model.safetensors", "README.md"} <= names
    assert not any(TOKEN.encode() in data for data in hub.objects.values())
    for repository in hub.repositories.values():
        for commit in (commit for history in repository.branches.values() for commit in history):
            assert not any(TOKEN.encode() in file.data for file in commit.files.values())
    assert TOKEN not in json.dumps({name: result for name, result in results.items() if name != "whole"})


def test_pushes_during_training(pushed):
    hub, results = pushed
    titles = [commit.title for commit in hub.repositories["ana/every_save"].branches["main"]]
    during = ["Training in progress, step 1", "Training in progress, step 2"]
    assert titles[1:] == [*during, "Model save", "In the background", "Last push"]
    assert results["every_save"]["warnings"] == []
    weights = {
        commit.files["model.safetensors"].oid for commit in hub.repositories["ana/every_save"].branches["main"][1:]
    }
    assert len(weights) == 5
    checkpoint = {path for path in hub.files("ana/last_checkpoint") if path.startswith("last-checkpoint/")}
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= checkpoint
    assert not any(
        "checkpoint-" in path for repo in hub.repositories for path in hub.files(repo) if path not in checkpoint
    )
    # PEFT's own card has the base model's path, which the Hub would refuse
    assert results["last_checkpoint"]["warnings"] == []


@pytest.mark.parametrize("name", ["dropped", "refused", "unreachable", "xet"])
def test_a_failed_push_loses_nothing_and_a_second_push_completes_it(pushed, folder, name):
    hub, results = pushed
    reason = {"dropped": "model.safetensors", "refused": "403", "unreachable": "disconnected", "xet": "404"}[name]
    error = results[name]["error"]
    assert (
        error.startswith("RuntimeError: Got ")
        and reason in error
        and f"ana/{name} was pushed to {hub.endpoint}" in error
    )
    assert f"complete in {folder / name}" in error and "trainer.push_to_hub()" in error and "hf upload" in error
    assert results[name]["intact"]
    assert hub.files(f"ana/{name}") == _local(folder / name)


def test_a_failure_to_save_is_not_reported_as_a_failed_push(pushed):
    _, results = pushed
    assert results["whole"]["unsaved"] == "OSError: [Errno 28] No space left on device"


def test_files_that_have_arrived_are_not_sent_again(pushed):
    hub, _ = pushed
    oid = _sha256(hub.files("ana/refused")["model.safetensors"])
    sent = [request.path for request in hub.requests if request.method == "PUT" and oid in request.path]
    assert len(sent) > 1 and len(sent) == len(set(sent))


def test_a_failed_background_upload_is_logged_and_training_goes_on(pushed, folder):
    hub, results = pushed
    result = results["background"]
    assert result["step"] == 2 and result["future"] == "HfHubHTTPError"
    for warnings in (result["warnings"], result["warnings_of_future"]):
        (warning,) = warnings
        assert "500" in warning and "ana/background" in warning and str(folder / "background") in warning
    titles = [commit.title for commit in hub.repositories["ana/background"].branches["main"]]
    assert titles[1:] == ["Training in progress, step 2", "Last push"]
    assert hub.files("ana/background") == _local(folder / "background")


# ---- The model card, without a Hub ----


@pytest.fixture
def card_of(make_config, tokenizer, para_dataset, tmp_path):
    """Returns the card of a trainer that has not trained."""

    def make(dataset=para_dataset, arguments=(), model="llama", processing_class=tokenizer, change=None, **options):
        model = tiny_model(model) if isinstance(model, str) else model
        trainer = MISOSFTTrainer(
            model, make_config(**options), train_dataset=dataset, processing_class=processing_class
        )
        if change:
            change(trainer)
        trainer.create_model_card(**dict(arguments))
        return (tmp_path / "out" / "README.md").read_text()

    return make


def _settings(card):
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card.split("### Verification")[0], re.M))


def test_card_states_the_settings_of_its_mode(card_of, para_dataset):
    para = _settings(card_of(full_context_weight=0.4, include_bare=False, para_prob=0.5))
    assert para["mode"] == "`para`" and para["weights of the contexts"].startswith("uniform")
    assert para["weight of the full context"] == "0.4" and para["rows presented as several contexts"] == "50%"
    assert para["the full instruction is a context"] == "yes" and para["the bare request is a context"] == "no"
    assert "probabilities of 1, 2, ... chunks" not in para
    succ = _settings(card_of(context_mode="succ", chunk_probs=[0.25, 0.75]))
    assert succ["probabilities of 1, 2, ... chunks"] == "0.25, 0.75" and "the bare request is a context" not in succ
    fid = _settings(card_of(context_weighting="fid"))
    assert fid["weights of the contexts"].startswith("fid")
    for mode in ("single", "augment"):
        card = card_of(context_mode=mode)
        assert "without a mixture of contexts" in card and "weights of the contexts" not in card
    assert "several contexts, separately from each other" not in card


def test_card_counts_contexts(card_of, para_dataset, make_config, tokenizer, monkeypatch):
    rows = [{"contexts": ["a ->", "b ->", "c ->"][: 1 + i % 3], "completion": " x"} for i in range(6)]
    counted = _settings(card_of(Dataset.from_list(rows), response_template=" ->"))["contexts per answer"]
    average = "2.0 on average (1 to 3), several for 67% of the answers"
    assert counted == f"{average}; counted in 6 examples from 6 of 6 rows"
    packed = _settings(card_of(Dataset.from_list(rows), response_template=" ->", packing=True))["contexts per answer"]
    assert packed.startswith(f"{average}; counted in 6 examples from 1 of 1 rows")
    streamed = _settings(card_of(para_dataset.to_iterable_dataset()))["contexts per answer"]
    assert streamed == "not counted (streamed data)"
    trainer = MISOSFTTrainer(tiny_model("llama"), make_config(), train_dataset=para_dataset, processing_class=tokenizer)
    many = trainer.train_dataset.select([i % 64 for i in range(5000)])
    answers, contexts = count_answers_and_contexts(many)
    assert answers == "" and contexts.endswith("counted in 1,000 examples from 1,000 of 5,000 rows")


def test_card_counts_answers(card_of):
    """A demonstration within the prompt, and two completions of three contexts each, beside a row of one answer."""
    shots = [user("The sea?"), assistant("Blue."), user("The sky?")]
    completions = [[assistant("Blue too.")], [assistant("Grey.")]]
    rows = [
        {"prompt": shots, "constraints": ["Be brief.", "Rhyme."], "completions": completions},
        {"prompt": shots[:1], "constraints": [], "completions": completions[:1]},
    ]
    last = _settings(card_of(Dataset.from_list(rows)))
    assert last["answers per example"] == "1.5 on average (1 to 2)"
    assert last["contexts per answer"].startswith(
        "3.0 on average (1 to 4), several for 67% of the answers; counted in 2"
    )
    assert "every completion of a prompt" in last["answers that are trained"]
    every = _settings(card_of(Dataset.from_list(rows), train_turns="all"))
    assert every["answers per example"] == "2.0 on average (1 to 3)"
    assert every["contexts per answer"].startswith("2.5 on average (1 to 4), several for 50% of the answers")
    assert 'train_turns="all"' in every["answers that are trained"]
    one = _settings(card_of(Dataset.from_list(rows[1:])))
    assert "answers that are trained" not in one and "answers per example" not in one
    assert 'train_turns="last"' in _settings(card_of(train_turns="last"))["answers that are trained"]


def test_card_header_and_links(card_of, tmp_path):
    """Ids on the Hub become links and metadata. Local names become neither, and local paths are not in the card."""
    model = tiny_model("llama")
    model.config._name_or_path = "ana/base"
    given = {"dataset_name": "ana/rows", "model_name": "sea", "tags": "sailing", "license": "mit", "language": "en"}
    card = card_of(model=model, arguments=given)
    header = _header(card)
    assert header["base_model"] == "ana/base" and header["datasets"] == "ana/rows" and header["model_name"] == "sea"
    assert header["library_name"] == "transformers" and header["license"] == "mit" and header["language"] == "en"
    assert {"trl", "sft", "miso", "sailing", "generated_from_trainer"} <= set(header["tags"])
    assert "[ana/base](https://huggingface.co/ana/base)" in card
    assert "[ana/rows](https://huggingface.co/datasets/ana/rows)" in card and 'from_pretrained("sea"' in card

    model.config._name_or_path = str(tmp_path / "models" / "llama-base")  # deleted, or on another machine
    (tmp_path / "rows.jsonl").touch()
    card = card_of(model=model, arguments={"dataset_name": str(tmp_path / "rows.jsonl")})
    assert not {"base_model", "datasets"} & set(_header(card))
    assert "`llama-base`" in card and "`rows.jsonl`" in card and str(tmp_path) not in card and "None" not in card
    assert "2505.11922" in card and "lu2025enhancing" in card and "vonwerra2020trl" in card


def test_card_shows_the_checks(card_of):
    assert "Not verified." in card_of()
    checks = [
        Check("packing changes nothing", "passed", 1.234e-6, 5e-5, "nats", "no\nwindow | binds"),
        Check("prefix sharing changes nothing", "skipped", note="share_prefixes is off"),
    ]
    card = card_of(change=lambda trainer: setattr(trainer, "verification", checks))
    assert "| packing changes nothing | passed | 1.2e-06 nats | 5e-05 nats | no window \\| binds |" in card
    assert (
        "| prefix sharing changes nothing | skipped |  |  | share_prefixes is off |" in card
        and "Not verified" not in card
    )


def test_card_of_a_quantized_model(card_of):
    def quantized(trainer):
        trainer.model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)

    assert _settings(card_of(change=quantized))["base model quantized"] == "bitsandbytes, 4 bit"


def test_usage_of_a_model_without_a_chat_template_runs(card_of, folder, tmp_path, capsys):
    rows = Dataset.from_list([{"prompt": "The sea is\nAnswer:", "completion": " blue"}] * 4)
    plain = AutoTokenizer.from_pretrained(folder / "base")
    plain.chat_template = None
    card = card_of(rows, processing_class=plain, response_template="\nAnswer:")
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    assert "messages" not in code and r'adjectives.\nAnswer:"' in code and 'from_pretrained("out"' in code
    variables = {}
    exec(code.replace('"out"', repr(str(folder / "base"))).replace("max_new_tokens=256", "max_new_tokens=2"), variables)
    assert variables["output"].shape[1] == variables["inputs"]["input_ids"].shape[1] + 2
