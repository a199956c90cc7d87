"""The benchmarks run, and their variants compute the same losses.

Times are not tested; `tests/attention/test_work.py` counts the work instead.
"""

import json
import subprocess
import sys

import pytest

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
    command = [sys.executable, "-m", "benchmarks.attention", "--device", device, "--quick", "--json", str(file)]
    command += ["--repeats", "1", "--patience", "0.01"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY
    )  # a CUDA device is not forked
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
