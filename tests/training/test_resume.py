"""Training that is killed at any moment and resumed has the losses and weights of an uninterrupted run, bit for bit."""

import json
import shutil
import signal

import pytest

from tests.support import resume_runs
from tests.support.processes import PROCESSES

CHUNKS = {"context_mode": "succ", "chunk_probs": [0.2, 0.4, 0.4], "packing": True, "max_length": 400}


def run(folder, resume=None, **options):
    """Train in a process of its own in `folder`; return its exit status."""
    folder.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=resume_runs.train, args=(folder, resume), kwargs=options)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def course(folder):
    """Loss and gradient norm of the last run of each step, and a digest of the final weights."""
    lines = [json.loads(line) for line in (folder / "course.jsonl").read_text().splitlines()]
    return {step: values for step, *values in lines}, (folder / "final").read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Returns the course of an uninterrupted run with given options, which is computed once."""
    courses = {}

    def make(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in courses:
            folder = tmp_path_factory.mktemp("uninterrupted")
            assert run(folder, **options) == 0
            courses[key] = course(folder)
            assert set(courses[key][0]) == set(range(1, resume_runs.STEPS + 1))
        return courses[key]

    return make


def checkpoints(folder):
    return sorted(path.name for path in (folder / "out").glob("checkpoint-*"))


def test_killed_in_every_write_of_a_checkpoint(tmp_path, uninterrupted):
    """One run is killed in each write of a save in turn and resumed each time. It never resumes from a half-written checkpoint."""
    options = {"para_prob": 0.5}
    statuses = []
    for number in range(1, 40):
        resume = bool(checkpoints(tmp_path)) or None
        # Writes are counted from the start of a run: those of the first checkpoint fail one by one, then those of later saves.
        statuses.append(run(tmp_path, resume, in_write=number, **options))
        if statuses[-1] == 0:
            break
        assert statuses[-1] == -signal.SIGKILL
        assert len(checkpoints(tmp_path)) <= 2  # the older one is removed once the newer has its name
    assert len(statuses) > 8 and statuses[-1] == 0
    assert course(tmp_path) == uninterrupted(**options)


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (1, {}),  # before the first checkpoint
        (3, CHUNKS),
        (5, {"neftune_noise_alpha": 5.0}),  # random numbers in every step
        (6, {"lora": True}),
        (3, {"stream": True, "train_sampling_strategy": "sequential"}),
        (5, {"dataloader_num_workers": 1}),
    ],
)
def test_killed_in_a_step(tmp_path, uninterrupted, step, options):
    assert run(tmp_path, at=step, **options) == -signal.SIGKILL
    assert bool(checkpoints(tmp_path)) == (step > 1)
    assert run(tmp_path, resume=bool(checkpoints(tmp_path)) or None, **options) == 0
    assert course(tmp_path) == uninterrupted(**options)


def test_sigterm_saves_and_ends(tmp_path, uninterrupted):
    """The current step is finished and saved, though no checkpoint was due. The script exits with SIGTERM's status."""
    assert run(tmp_path, at=4, act=resume_runs.terminate) == 128 + signal.SIGTERM
    assert checkpoints(tmp_path) == ["checkpoint-5"]
    assert run(tmp_path, resume=True) == 0
    assert course(tmp_path) == uninterrupted()


def test_sigterm_keeps_its_checkpoint(tmp_path):
    """It stays with save_total_limit=1 though it is not the best one, and no evaluation delays it."""
    options = {"load_best_model_at_end": True, "metric_for_best_model": "rising", "save_total_limit": 1}
    assert run(tmp_path, at=4, act=resume_runs.terminate, evaluate="rising", **options) == 128 + signal.SIGTERM
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-5"]
    assert run(tmp_path, resume=True, evaluate="rising", **options) == 0


def test_moved_output_dir_keeps_its_best_checkpoint(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "rising", "save_total_limit": 1}
    assert run(tmp_path / "here", at=5, evaluate="rising", **options) == -signal.SIGKILL
    (tmp_path / "here").rename(tmp_path / "there")
    assert run(tmp_path / "there", resume=True, evaluate="rising", **options) == 0
    assert checkpoints(tmp_path / "there") == ["checkpoint-2"]  # transformers removes the last one at the end


def test_disk_full(tmp_path, uninterrupted):
    """The error says what is missing and how to go on. The last checkpoint stays, and training resumes from it."""
    assert run(tmp_path, at=3, act=resume_runs.fill_disk) == 1
    error = (tmp_path / "error").read_text()
    assert "while checkpoint-4 was written" in error and "checkpoint-2. Expected space" in error
    assert checkpoints(tmp_path) == ["checkpoint-2"] and not (tmp_path / "out" / "_incomplete").exists()
    assert run(tmp_path, resume=True) == 0
    assert course(tmp_path) == uninterrupted()


def test_incomplete_copies_are_not_resumed_from(tmp_path, uninterrupted):
    """`True` skips them; by name they are refused."""
    assert run(tmp_path, at=5, save_total_limit=None) == -signal.SIGKILL
    out = tmp_path / "out"
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    weights = out / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-6", ignore=lambda *_: ["trainer_state.json"])
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-7")
    (out / "checkpoint-7" / "miso_files.json").write_text('{"optim')
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-9000-old")  # a user's copy
    for name, why in (
        (4, "model.safetensors"),
        (6, "no trainer_state.json"),
        (7, "cannot be read"),
        (9, "not a folder"),
    ):
        assert run(tmp_path, resume=str(out / f"checkpoint-{name}")) == 1
        assert "ValueError" in (error := (tmp_path / "error").read_text()) and why in error
    assert run(tmp_path, resume="True") == 0  # as a command line passes it
    assert course(tmp_path) == uninterrupted()


def test_nothing_to_resume_from(tmp_path):
    assert run(tmp_path, resume=True) == 1
    assert "no complete checkpoint" in (tmp_path / "error").read_text()
    assert run(tmp_path, save_only_model=True, max_steps=2) == 0
    assert run(tmp_path, resume=True) == 1
    assert "save_only_model" in (tmp_path / "error").read_text()
