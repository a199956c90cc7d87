"""The benchmarks run, and their variants compute the same losses.

Times are not tested; `tests/attention/test_work.py` counts the work instead.
"""

import json
import subprocess
import sys
from copy import deepcopy

import pytest

from benchmarks.dilution import repetition, written
from tests.support.models import tiny_model
from tests.support.processes import REPOSITORY, run_python


def run(name, *arguments):
    return run_python("-m", f"benchmarks.{name}", *arguments, OMP_NUM_THREADS="1")[0]


def test_a_step(tmp_path):
    file = tmp_path / "figures.json"
    run("step", "--quick", "--rows", 2, "--repeats", 1, "--workloads", "half", "--json", file)
    figures = json.loads(file.read_text())
    loss = {name: variant["loss"] for name, variant in figures["variants"]["half"].items()}
    plain = ["SFTTrainer, packed", "SFTTrainer, row by row", "MISO single"]
    assert [loss[name] for name in plain] == pytest.approx([loss[plain[0]]] * 3, abs=2e-4)  # logged to four decimals
    assert abs(loss["MISO para"] - loss["MISO single"]) > 2e-4
    assert figures["para_shared_demos_over_sft"] > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_operator_alone(device, tmp_path):
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    file = tmp_path / "figures.json"
    # In a new interpreter: a CUDA device is not forked.
    command = [sys.executable, "-m", "benchmarks.attention", "--device", device, "--quick", "--json", str(file)]
    command += ["--repeats", "1", "--patience", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(file.read_text())
    assert {record["length"] for record in figures["lengths"]} == {1024, 2048, 4096}
    chunks = [record["pairs"] for record in figures["chunks"]]
    assert chunks == sorted(chunks, reverse=True)


def test_conversations():
    """One causal run of four answers has the tokens of one row; a tree has more, and fewer than one row per answer."""
    run_, tree = [line.split() for line in run("conversations", "--turns", 4, "--rows", 3).splitlines()[-2:]]
    assert [run_[0], tree[0]] == ["qwen2_5", "qwen3"]
    assert float(run_[4]) > float(tree[4]) > 1
    assert run_[5] == tree[5] and 20 < int(run_[5][:-1]) < 30


def test_decoding(tmp_path):
    file = tmp_path / "figures.json"
    run("decoding", "--quick", "--repeats", 1, "--new", 4, "--size", "tiny", "--json", file)
    one, four = json.loads(file.read_text())["cases"]
    assert all(len(case[f"new_{name}"]) == 4 for case in (one, four) for name in ("plain", "miso"))
    assert one["new_miso"] == one["new_plain"]
    assert [case["tokens"] for case in (one, four)] == [256, 1024]


def test_dilution(tmp_path, tokenizer):
    """Any checkpoint is measured. All weightings agree on one context, and vanilla leaves less to the output with each more."""
    model, file = tmp_path / "model", tmp_path / "figures.json"
    tiny_model("llama").save_pretrained(model)
    tokenizer.save_pretrained(model)
    pages = ["--figure", tmp_path / "figure.png", "--markdown", tmp_path / "tables.md"]
    printed = run("dilution", "--models", model, "--quick", "--prompts", 1, "--json", file, *pages)
    figures = json.loads(file.read_text())[str(model)]
    one, *more = figures["mean"].values()
    assert list(figures["mean"]) == list(figures["written"]) == ["1", "2", "4", "8"]
    assert len(set(one.values()) - {one["equation 6"]}) == 1
    vanilla = [one["vanilla"], *(line["vanilla"] for line in more)]
    assert vanilla == sorted(vanilla, reverse=True) and len(set(vanilla)) == 4
    assert all(len(line) == 4 for line in figures["written"].values())
    assert f"{vanilla[-1]:.1%}" in printed and f"{vanilla[-1]:.1%}" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_texts_written_without_a_chat_template(tokenizer):
    plain = deepcopy(tokenizer)
    plain.chat_template = None
    found = written(tiny_model("llama").eval(), plain, prompts=2, contexts=2, tokens=4)
    assert list(found) == ["standard", "uniform", "fid", "vanilla"]
    assert all(perplexity > 1 for perplexity, _ in found.values())
    assert repetition([[1, 2, 3, 1, 2, 3, 1, 2, 3], [1, 2, 3]], n=3) == pytest.approx(4 / 8)
