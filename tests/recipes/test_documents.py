"""Code that users and their agents copy runs: the notebook, and the skill in the wheel."""

import re

import pytest

from tests.support.models import tiny_model
from tests.support.processes import REPOSITORY
from trl_miso import MISOSFTConfig
from trl_miso.cli.main import run

SKILL = REPOSITORY / "trl_miso" / ".agents" / "skills" / "trl-miso" / "SKILL.md"
NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Every cell, in Jupyter's own kernel; the training stops after three steps."""
    nbformat = pytest.importorskip("nbformat", reason="the extra dev is not installed")
    nbclient = pytest.importorskip("nbclient", reason="the extra dev is not installed")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.outputs for cell in notebook.cells if "print(" in cell.source)  # GitHub shows what was printed
    [training] = [cell for cell in notebook.cells if "num_train_epochs=3" in cell.source]
    training.source = training.source.replace("num_train_epochs=3", "max_steps=3").replace("steps=10", "steps=1")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "Verified on this model" in printed and "step   3  loss" in printed
    assert (tmp_path / "quickstart" / "model.safetensors").exists()


@pytest.fixture
def skill():
    return SKILL.read_text(encoding="utf-8")


def test_the_skill_runs(skill, tmp_path, tokenizer, monkeypatch):
    """Its code, verbatim except for the model and options for a CPU."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    training, generation = re.findall(r"```python\n(.*?)```", skill, flags=re.DOTALL)
    assert "meta-llama/Llama-3.2-1B-Instruct" in training and training.count("output_dir=") == 1
    cpu = "max_steps=1, use_cpu=True, report_to=[], save_strategy='no', output_dir="
    names = {}
    exec(training.replace("meta-llama/Llama-3.2-1B-Instruct", "model").replace("output_dir=", cpu), names)
    names |= {"model": names["trainer"].model, "tokenizer": tokenizer}
    exec(generation, names)
    assert names["out"].shape[0] == 1


def test_the_skill_names_what_there_is(skill):
    """A header that agents read, settings with their defaults, and commands."""
    assert re.match(r"---\nname: trl-miso\ndescription: .{50,1024}\n---\n", skill)
    table = skill.split("## Settings that matter")[1].split("##")[0]
    for name, default in re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", table, flags=re.MULTILINE):
        assert MISOSFTConfig.__dataclass_fields__[name].default == eval(default)
    for command in set(re.findall(r"`trl-miso (\w+)", skill)):
        with pytest.raises(SystemExit, match="0"):
            run(command, ["--help"])
