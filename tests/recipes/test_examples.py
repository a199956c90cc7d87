"""train_crab.py as a user runs it: without arguments, with a local file of each kind, with a recipe."""

import json
import os
import subprocess
import sys

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.models import tiny_model
from tests.support.processes import REPOSITORY, run_python

SCRIPT = REPOSITORY / "examples" / "train_crab.py"
REAL = REPOSITORY.parent / "shared" / "data" / "multi_constraint" / "rows.jsonl"


@pytest.fixture
def train_crab(tmp_path):
    def run(*arguments):
        return "".join(run_python(SCRIPT, *arguments, cwd=tmp_path))

    return run


def _loads(folder):
    AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_embedded_default(tmp_path):
    """In a new interpreter."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(SCRIPT), "--max_steps", "12", "--logging_steps", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout + done.stderr
    losses = [float(x) for x in printed.split("Training loss: ")[1].split(". Saved")[0].split(" -> ")]
    assert losses[1] < losses[0] - 0.5
    assert "Before:" in printed and "After:" in printed and "[x]" in printed
    _loads(tmp_path / "crab-miso")


@pytest.mark.skipif(not REAL.exists(), reason="shared/data/multi_constraint is not here")
def test_real_rows_as_they_are(train_crab, tmp_path):
    printed = train_crab(
        *("--dataset_name", REAL, "--as_messages", "--max_steps", 2, "--per_device_train_batch_size", 2),
        *("--logging_steps", 1),
    )
    assert "train dataset: 5" in printed and "100% with several contexts" in printed
    _loads(tmp_path / "crab-miso")


def test_parquet_and_recipe(train_crab, tmp_path):
    rows = [
        {"contexts": [f"note {i}", "see the sea"], "completion": " blue", "prompt": f"note {i} and the sea"}
        for i in range(8)
    ]
    options = {
        "dataset_name": str(tmp_path / "rows.parquet"),
        "response_template": " ->",
        "context_weighting": "fid",
        "max_steps": 2,
        "logging_steps": 1,
        "output_dir": str(tmp_path / "recipe"),
    }
    for row in rows:
        row.update(prompt=row["prompt"] + " ->", contexts=[c + " ->" for c in row["contexts"]])
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "recipe.yaml").write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in options.items()))
    assert "100% with several contexts (2.0 on average)" in train_crab("--config", tmp_path / "recipe.yaml")
    _loads(tmp_path / "recipe")


def test_string_rows_of_every_format_become_chat_rows_where_asked(train_crab, tmp_path):
    """Constraints with a verbatim full prompt, and contexts with a prompt."""
    rows = {
        "constraints": {"prompt": "Sing", "constraints": ["Rhyme."], "full_prompt": "Sing. Rhyme.", "completion": "La"},
        "contexts": {"prompt": "a and b", "contexts": ["a", "b!"], "completion": "c"},
    }
    for name, row in rows.items():
        Dataset.from_list([row] * 4).to_json(tmp_path / f"{name}.jsonl")
        assert "100% with several contexts" in train_crab(
            "--dataset_name", f"{name}.jsonl", "--as_messages", "--max_steps", 1
        )


def test_readme_example_runs(tmp_path, para_dataset, tokenizer, monkeypatch):
    """The README's first Python block, verbatim except for the model, the file and options for a CPU."""
    text = (REPOSITORY / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    para_dataset.select_columns(["prompt", "constraints", "completion"]).to_json(tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    cpu = "max_steps=2, use_cpu=True, report_to=[], save_strategy='no', output_dir="
    assert "meta-llama/Meta-Llama-3-8B-Instruct" in code and code.count("output_dir=") == 1
    exec(code.replace("meta-llama/Meta-Llama-3-8B-Instruct", "model").replace("output_dir=", cpu), {})
    _loads(tmp_path / "Llama-3-8B-MISO")
