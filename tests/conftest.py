"""Shared fixtures: everything is local and generated, no hub is asked."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads cost more than they give
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from datasets import Dataset
from rich.console import Console

from trl_miso import MISOSFTConfig
from trl_miso.sources.crab import crab_row
from trl_miso.sources.synthetic import build_tokenizer, synthetic_rows

# The longest files come first, so that processes that share the files end together.
LONG = [
    "distributed",
    "resume",
    "streams",
    "benchmarks",
    "examples",
    "hub",
    "fuzz",
    "callback",
    "miniature",
    "report_page",
    "smollm2",
]
# `-m fast`: files that cover every step from a row to the gradient, in about a minute.
FAST = {
    *("the_idea", "rooms", "private_names", "readme", "config", "segments", "packed"),
    *("contexts", "plain_templates", "chat_template", "collator"),
    *("kernels", "work", "context_parts", "reliability", "sharegpt", "r1_distill", "complexbench"),
}


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
    for item in items:
        if item.path.stem.removeprefix("test_") in FAST:
            item.add_marker("fast")


def pytest_collection_finish(session):
    """Exempt modules and tests from garbage collection: every training collects, which took a second each over their objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def crab_rows():
    return synthetic_rows(64, seed=1)


@pytest.fixture(scope="session")
def tokenizer(crab_rows):
    return build_tokenizer(crab_rows, vocab_size=512)


@pytest.fixture(scope="session")
def para_dataset(crab_rows):
    """Rows with prompt, constraints, completion and full_prompt."""
    dataset = Dataset.from_list(crab_rows)
    return dataset.map(crab_row, remove_columns=dataset.column_names)


@pytest.fixture
def make_config(tmp_path):
    """MISOSFTConfig for the CPU: float32, one log line a step, nothing saved or verified."""

    def make(cls=MISOSFTConfig, **kwargs):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "bf16": False,
            "use_cpu": True,
            "report_to": [],
            "logging_steps": 1,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        if issubclass(cls, MISOSFTConfig):
            defaults["verify"] = False
        return cls(**(defaults | kwargs))

    return make


@pytest.fixture
def wide_terminal(monkeypatch):
    """200 columns, whatever the test runs in; given to rich, since `map` with num_proc puts another `os.environ` in place."""
    monkeypatch.setattr(Console, "_environ", {"COLUMNS": "200", "TERM": "xterm"})


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """An untrained Punkt tokenizer in place of NLTK's, so that lm-eval's checkers run: enough for sentences without abbreviations."""
    pytest.importorskip("lm_eval", reason="needs pip install 'trl-miso[eval]'")
    nltk = pytest.importorskip("nltk")
    english = tmp_path / "nltk_data/tokenizers/punkt_tab/english"
    english.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (english / name).touch()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    return tmp_path / "nltk_data"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
