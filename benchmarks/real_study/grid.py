"""All runs of a study, over several processes, and the ledgers of finished work from which a killed study resumes."""

import hashlib
import json
import multiprocessing
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.common.ledger import Ledger
from benchmarks.common.real_models import add_punkt_tab
from benchmarks.common.statistics import instruction_level
from benchmarks.common.workers import start_worker
from benchmarks.real_study.evaluate import attention_on_constraints, examine, prompts_of
from benchmarks.real_study.rows import make_splits, read_prompts, write_answers
from benchmarks.real_study.sets import SETS, published_prompts, published_sets, scorers
from benchmarks.real_study.study import BASE, METHODS, Study
from benchmarks.real_study.training import Run, finetune

ANSWERED_AT_ONCE = 40

Trained = tuple[PreTrainedModel, dict[str, float]]  # a model and the work its training took


@dataclass(frozen=True)
class Files:
    """`model`: a checkpoint folder. `prompts`: see `rows.read_prompts`. `ifeval`, `bases`: as for `trl-miso eval`; without bases no Flat.

    `chat_template`, `eos_token`: a template file, and the token that ends its turns, for a base model.
    """

    model: str
    prompts: str
    ifeval: str | None
    bases: str | None
    chat_template: str | None = None
    eos_token: str | None = None


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def code_version() -> str:
    """The commit at work, with a mark if files differ from it."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass(frozen=True)
class Workshop:
    """Makes rows, trains and examines models. Pickled and sent to worker processes, each of which writes ledgers of its own."""

    study: Study
    files: Files
    folder: Path
    device: str
    commit: str

    @property
    def batch(self) -> int:
        return 512 if self.device == "cuda" else 64  # on a CPU, the padding of larger batches costs more than they save

    @cached_property
    def prompts(self) -> list[dict[str, str]]:
        """The prompts that are answered: none of a published set's, with its constraints or without."""
        excluded = published_prompts(self.files.ifeval, self.files.bases, self.study.ifbench != 0)
        return read_prompts(self.files.prompts, excluded, self.study.pool, self.study.max_prompt_words)

    @cached_property
    def environment(self) -> list[Any]:
        """What changes figures without being part of the study: device, versions, and the weights."""
        if self.device == "cuda":
            device = torch.cuda.get_device_name()
        else:
            device = torch.backends.cpu.get_cpu_capability() + (", bfloat16" if self.bf16 else "")
        weights = hashlib.sha256()
        with (Path(self.files.model) / "model.safetensors").open("rb") as file:
            while block := file.read(1 << 24):
                weights.update(block)
        return [device, *(module.__version__ for module in (torch, transformers, trl)), weights.hexdigest()]

    def ledger(self, name: str) -> Ledger:
        return Ledger(self.folder / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.jsonl")

    def load(self) -> tuple[Any, Any]:
        model = AutoModelForCausalLM.from_pretrained(self.files.model, dtype=self.dtype).to(self.device).eval()
        model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        return model, self.tokenizer

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(self.files.model)
        if self.files.eos_token:
            tokenizer.eos_token = self.files.eos_token
        if self.files.chat_template:
            tokenizer.chat_template = Path(self.files.chat_template).read_text(encoding="utf-8")
        if tokenizer.chat_template is None:
            raise ValueError(
                "Got a model without a chat template, expected one. Fix: give --chat_template and --eos_token."
            )
        return tokenizer

    @property
    def dtype(self) -> str:
        """Of models that answer. Training has float32 weights, computed in this dtype."""
        return "bfloat16" if self.bf16 else "float32"

    @cached_property
    def bf16(self) -> bool:
        """On a GPU, and on a CPU with AVX512-BF16, unless `ATEN_CPU_CAPABILITY` keeps torch from using AVX-512.

        On such a CPU (AMD EPYC, one core, SmolLM2) training steps of SFT take 0.6 of the time in float32, of para 0.9, answers 0.6.
        """
        if self.device == "cuda":
            return True
        has_bf16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
        return has_bf16 and torch.backends.cpu.get_cpu_capability() == "AVX512"

    # Rows

    def answer_part(self, name: str, prompts: Sequence[str]) -> None:
        """Write a part of the answers to the ledger `name`."""
        model, tokenizer = self.load()
        texts = write_answers(model, tokenizer, prompts, self.study.answer_tokens)
        self.ledger(name).add({"key": self.answers_key(prompts), "commit": self.commit, "answers": texts})

    def answers_key(self, prompts: Sequence[str]) -> str:
        return _digest("answers", self.study.answer_tokens, list(prompts), self.environment)

    def parts(self) -> list[tuple[str, list[str]]]:
        """Names of ledgers and prompts, for all prompts whose answers the model writes."""
        prompts = [row["prompt"] for row in self.prompts]
        starts = range(0, len(prompts), ANSWERED_AT_ONCE) if self.study.answers == "own" else ()
        return [(f"answers {start}", prompts[start : start + ANSWERED_AT_ONCE]) for start in starts]

    @cached_property
    def splits(self) -> dict[str, list[dict[str, Any]]]:
        if self.study.answers == "own":
            answers = [
                answer
                for name, part in self.parts()
                for answer in self.ledger(name).records[self.answers_key(part)]["answers"]
            ]
        else:
            answers = [row["answer"] for row in self.prompts]
        return make_splits(self.prompts, answers, self.study.dev, self.study.dense)

    # Examinations

    @cached_property
    def tests(self) -> dict[str, list[dict[str, Any]]]:
        """The prompts of each test set."""
        sizes = {"IFEval": self.study.ifeval, "Flat": self.study.flat, "IFBench": self.study.ifbench}
        sets = published_sets(self.files.ifeval, self.files.bases, sizes) | {"Dense": prompts_of(self.splits["dense"])}
        return {name: sets[name] for name in SETS if sets.get(name)}

    def examine(self, split: str, model: Any) -> dict[str, Any]:
        """Answer and score the prompts of `dev`, of `train`, or of all tests (`test`, with attention on the constraints)."""
        sets = self.tests if split == "test" else {split: prompts_of(self.splits[split])}
        results = examine(model, self.tokenizer, sets, scorers(sets), self.study.answer_tokens, self.batch)
        if split != "test":
            return results[split]
        rows = self.splits["dense"][: self.study.attention]
        return {"sets": results, "attention": attention_on_constraints(model, self.tokenizer, rows)}

    def key(self, run: Run | None, split: str) -> str:
        """Key of a record: a hash of everything but the code that determines it."""
        study = asdict(self.study)
        for name in ("methods", "seeds", "learning_rates", "resamples"):
            del study[name]
        ifbench = [prompt["key"] for prompt in self.tests.get("IFBench", ())]  # depends on what is installed
        if not ifbench:
            del study["ifbench"]
        method = asdict(METHODS[run.method]) if run else None
        template = [self.tokenizer.chat_template, self.tokenizer.eos_token]
        parts = [split, study, asdict(run) if run else None, method, self.splits, template, self.environment]
        return _digest(*parts, *([ifbench] if ifbench else ()))

    def train(self, run: Run) -> Trained:
        base = Path(self.files.model)
        model, work = finetune(base, self.tokenizer, run, self.study, self.training_rows(run), self.device, self.bf16)
        model = model.to(getattr(torch, self.dtype))
        model.generation_config.eos_token_id = self.tokenizer.eos_token_id
        return model, work

    def record(self, run: Run, split: str, trained: Trained | None = None) -> Trained | None:
        """Examine the run's model on a split, unless the ledger has that.

        Args:
            trained: The run's model, if it is at hand. Otherwise it is trained where it is needed.

        Returns:
            The run's model, if it is at hand now.
        """
        ledger, key = self.ledger(run.method), self.key(run, split)
        if key not in ledger.records:
            model, work = trained = trained or self.train(run)
            results = self.examine(split, model)
            record = {"key": key, "split": split, "commit": self.commit} | asdict(run)
            ledger.add(record | {"work": work, "results": results})
        return trained

    def training_rows(self, run: Run) -> list[dict[str, Any]]:
        rows = self.splits["train"]
        if METHODS[run.method].signal != "misses":
            return rows
        verdicts = self.base_record("train")["results"]["verdicts"]
        return [row | {"followed": [c == "1" for c in flags]} for row, flags in zip(rows, verdicts, strict=True)]

    def examine_base(self) -> str:
        for split in ("dev", "test"):
            self.base_record(split)
        return BASE

    def base_record(self, split: str) -> dict[str, Any]:
        """The base model's record on `dev`, `test`, or the training rows (`train`, which only `misses` needs)."""
        ledger, key = self.ledger(f"{BASE} {split}"), self.key(None, split)
        if key not in ledger.records:
            model, _ = self.load()
            results = self.examine(split, model)
            ledger.add({"key": key, "split": split, "commit": self.commit, "method": BASE, "results": results})
        return ledger.records[key]

    def run_method(self, method: str) -> str:
        """All runs of a method: choose the learning rate on dev with seed 0, then test each seed."""
        trained = None  # of the best learning rate so far, which the test of seed 0 needs again
        for rate in self.study.learning_rates:
            latest = self.record(Run(method, rate, 0), "dev")
            if self.chosen_rate(method) == rate:
                trained = latest
        rate = self.chosen_rate(method)
        for seed in range(self.study.seeds):
            trained = self.record(Run(method, rate, seed), "test", trained if seed == 0 else None)
        return method

    def dev_scores(self, method: str) -> dict[float, float]:
        """Share of the instructions of dev that are followed, by learning rate, of those that were tried."""
        records = self.ledger(method).records
        scores = {}
        for rate in self.study.learning_rates:
            if record := records.get(self.key(Run(method, rate, 0), "dev")):
                scores[rate] = instruction_level([record["results"]["verdicts"]]).accuracy
        return scores

    def chosen_rate(self, method: str) -> float:
        """The best rate on dev; of equal ones the smallest."""
        scores = self.dev_scores(method)
        return max(sorted(scores), key=scores.__getitem__)


def run_grid(workshop: Workshop, workers: int, advance: Callable[[str], None]) -> None:
    """Do all work that the ledgers do not hold.

    Args:
        advance: Called with a line of text after each unit of work.
    """
    with _pool(workers) as submit:
        missing = []
        for name, part in workshop.parts():
            if workshop.answers_key(part) not in workshop.ledger(name).records:
                missing.append((workshop.answer_part, (name, part)))
        for number, _ in enumerate(submit(missing), start=1):
            advance(f"answers: part {number} of {len(missing)}")
        sizes = ", ".join(f"{len(rows)} {name}" for name, rows in workshop.splits.items())
        advance(f"rows: {sizes}")
        methods = [(workshop.run_method, (name,)) for name in workshop.study.methods]
        for name in submit([(workshop.examine_base, ()), *methods]):
            advance(f"{name} done")


Work = tuple[Callable[..., Any], tuple]  # a function and its arguments


@contextmanager
def _pool(workers: int) -> Iterator[Callable[[list[Work]], Iterator[Any]]]:
    """A function that does work in worker processes and yields results as they come."""
    if workers == 1:
        _start()
        yield lambda works: (work(*arguments) for work, arguments in works)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start) as pool:

        def submit(works: list[Work]) -> Iterator[Any]:
            for future in as_completed([pool.submit(work, *arguments) for work, arguments in works]):
                yield future.result()

        yield submit


def _start() -> None:
    start_worker()
    add_punkt_tab()
