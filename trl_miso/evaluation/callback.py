"""`MISOEvalCallback`: answer and score held-out prompts by standard inference while a model is trained."""

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.logging import get_logger
from transformers import TrainerCallback

from trl_miso.data.schema import template_kwargs
from trl_miso.evaluation import ifbench, ifeval
from trl_miso.evaluation.backends import check_length
from trl_miso.evaluation.ifeval import Counts, Scorer, Verdict, checkable
from trl_miso.evaluation.in_training import preserve_rng, respond_in_training

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

HeldOutRow = dict[str, Any]
Score = Callable[[HeldOutRow, str], Mapping[str, bool] | Sequence[bool]]

_STRICT_AND_LOOSE = ("prompt_strict", "inst_strict", "prompt_loose", "inst_loose", "average")
_ACCURACIES = {"ifeval": _STRICT_AND_LOOSE, "ifbench": _STRICT_AND_LOOSE, "constraints": ("prompt", "inst")}
_TRIAL_RESPONSES = ("", "Yes.")  # every row is scored with these before training, to find errors of rows and scorers

logger = get_logger(__name__)


@dataclass(frozen=True)
class Scores:
    """Scores of the held-out prompts after `step` steps of training.

    Attributes:
        benchmark: "ifeval", "ifbench", or "constraints" for a scorer of the user's (whose strict and loose verdicts are equal).
        unscored: Rows, from 1, on which the scorer failed. They count as following no constraint.
        seconds: Duration of responses and verdicts.
    """

    benchmark: str
    dataset_name: str | None
    step: int
    counts: Counts
    unscored: tuple[int, ...]
    max_new_tokens: int
    seconds: float

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the metrics to log: accuracies from 0 to 1 of prompts (all instructions followed) and of instructions."""
        accuracies = [percentage / 100 for percentage in self.counts.percentages()]
        values = dict(zip(_ACCURACIES[self.benchmark], [*accuracies, fmean(accuracies)], strict=False))
        values |= {"unscored": len(self.unscored), "runtime": round(self.seconds, 4)}
        return {f"{prefix}_{self.benchmark}_{name}": value for name, value in values.items()}


class MISOEvalCallback(TrainerCallback):
    """Score the model under training on held-out prompts, by standard inference: ordinary attention, the prompt alone, greedy decoding.

        >>> config = MISOSFTConfig(
        ...     eval_strategy="steps", eval_steps=200, save_steps=200,
        ...     load_best_model_at_end=True, metric_for_best_model="eval_ifeval_prompt_strict",
        ... )
        >>> trainer = MISOSFTTrainer(model, config, train_dataset=rows, eval_dataset=few_rows)
        >>> trainer.add_callback(MISOEvalCallback(trainer, load_prompts(None), num_prompts=100, dataset_name="google/IFEval"))

    Each evaluation of the trainer (`eval_strategy`, `eval_on_start`, `trainer.evaluate()`) returns these metrics beside its loss, and
    logs them to the trackers of `report_to`. `metric_for_best_model`, `save_strategy="best"` and EarlyStoppingCallback can use them.
    Without `eval_strategy` the model is scored once, after the last step. The model card shows the scores of the final weights: those of
    the best checkpoint if `load_best_model_at_end` is set.

    | metric | |
    | --- | --- |
    | `eval_ifeval_prompt_strict`, `eval_ifeval_prompt_loose` | share of prompts all of whose instructions are followed |
    | `eval_ifeval_inst_strict`, `eval_ifeval_inst_loose` | share of instructions that are followed |
    | `eval_ifeval_average` | mean of these four |
    | `eval_ifeval_unscored` | number of prompts on which the scorer failed |
    | `eval_ifeval_runtime` | seconds for responses and verdicts, included in `eval_runtime` |

    With `benchmark="ifbench"` the names begin with `eval_ifbench_`; callbacks of different benchmarks can be added to one trainer. With a
    scorer of your own: `eval_constraints_prompt`, `eval_constraints_inst`, `..._unscored` and `..._runtime`.

    The scores of an evaluation equal those of `trl-miso eval BENCHMARK --model CHECKPOINT` on the same rows, up to rounding where training
    has another precision than the checkpoint. The callback does not change the trained weights by a bit. Its cost is that of generation:
    ceil(prompts / batch_size / processes) batches of up to `max_new_tokens` forwards each, and the memory of a cache for `batch_size`
    rows. Under FSDP2 and DeepSpeed ZeRO-3 every forward gathers the weights.

    Args:
        trainer ([`MISOSFTTrainer`]): The trainer that the callback is added to.
        prompts: Rows with `prompt` (text of a user turn, or messages) and, for a benchmark's checkers, `instruction_id_list` and `kwargs`
            (`load_prompts` of `trl_miso.evaluation.ifeval` and of `trl_miso.evaluation.ifbench` read the benchmarks' own prompts). The
            columns `tools` and `chat_template_kwargs` go to the chat template. Rows of para are asked with their `full_prompt`; a null
            instruction is not scored.
        score: A function of a row and a response. It returns a list or dict of bools, one per constraint of the row: whether the
            response follows it. Default: the checkers of `benchmark`. Every process calls it for its share of the rows.
        num_prompts: Number of rows to use, from the first (default: all).
        max_new_tokens: Limit per response, in tokens.
        batch_size: Prompts per batch and process.
        dataset_name: Origin of the prompts, for the model card. The name of a data set on the Hub becomes metadata of the card too.
        benchmark: Whose checkers score the responses without `score`: "ifeval" (lm-eval's, the default) or "ifbench" (those of the package
            ifbench).

    Attributes:
        scores ([`Scores`], *optional*): The latest scores; after training, those of the final weights.
        responses (list of str): The latest responses, one per row.

    Raises:
        ImportError: Without `score`, if lm-eval, or for IFBench the package ifbench, is not installed.
        ValueError: If a row has no usable prompt, or cannot be scored (every row is scored with trial responses); if the tokenizer has no
            chat template; without `score`, if NLTK's data is missing; if `benchmark` is unknown, or given beside `score`. When training
            begins, if `metric_for_best_model` looks like a score but is not one of the metrics above.
        RuntimeError: If the model cannot generate. The longest prompt is tried when training begins. During training a checkpoint is
            saved first.

    A scorer that raises during training does not end the training: the row counts as following no constraint, an error with the row's
    number is logged, and `..._unscored` counts the row.
    """

    def __init__(
        self,
        trainer: Any,
        prompts: Iterable[Mapping[str, Any]],
        score: Score | None = None,
        num_prompts: int | None = None,
        max_new_tokens: int = 1280,
        batch_size: int = 8,
        dataset_name: str | None = None,
        benchmark: str | None = None,
    ):
        _check_trainer(trainer)
        _check_at_least_1(
            num_prompts=1 if num_prompts is None else num_prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        self.benchmark = _benchmark_of(benchmark, score)
        self.scores: Scores | None = None
        self.responses: list[str] = []
        self._trainer, self._dataset_name = trainer, dataset_name
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        self._rows = _held_out_rows(prompts, num_prompts)
        self._score = _load_scorer(self.benchmark, self._rows) if score is None else partial(_verdict_of, score)
        self._prompt_ids = [_prompt_ids(trainer, row, number) for number, row in enumerate(self._rows, start=1)]
        check_length(trainer.model.config, max(len(ids) for ids in self._prompt_ids), max_new_tokens)
        with preserve_rng():
            self._constraint_counts = [self._try_scorer(row, number) for number, row in enumerate(self._rows, start=1)]
        self._scores_by_step: dict[int, Scores] = {}
        self._loaded_step: int | None = None  # step of the best checkpoint, once training has ended and loaded it

    def on_train_begin(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        self._scores_by_step, self._loaded_step, self.scores = {}, None, None
        if sum(other.benchmark == self.benchmark for other in callbacks_of(self._trainer)) > 1:
            raise ValueError(
                f"Got several MISOEvalCallbacks that score {self.benchmark}, expected one: their metrics have the same names. Fix: join "
                "their prompts, and let the scorer tell the rows apart."
            )
        self._check_best(args.metric_for_best_model or "")
        self._respond([max(self._prompt_ids, key=len)], 2, lambda number, response: None)

    def _check_best(self, metric: str) -> None:
        """Raise ValueError if `metric_for_best_model` looks like a score, but no callback of the trainer measures it."""
        metric_name = f"eval_{metric.removeprefix('eval_')}"
        benchmarks = set(_ACCURACIES)
        if isinstance(self._trainer.eval_dataset, dict):
            benchmarks -= (
                self._trainer.eval_dataset.keys()
            )  # "eval_ifeval_loss" may be the loss of an evaluation set of this name
        names = []
        for callback in callbacks_of(self._trainer):
            names += [f"eval_{callback.benchmark}_{accuracy}" for accuracy in _ACCURACIES[callback.benchmark]]
        if metric_name.startswith(tuple(f"eval_{benchmark}_" for benchmark in benchmarks)) and metric_name not in names:
            raise ValueError(
                f"Got metric_for_best_model={metric!r}, expected one of {names}. Fix: set it to one of these."
            )

    def on_train_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if self._trainer.terminated:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # The step is that in the checkpoint's name: best_global_step may have no checkpoint of its own.
            self._loaded_step = int(Path(state.best_model_checkpoint).name.rpartition("-")[2])
            # A checkpoint from before training was resumed has no scores yet.
            self.scores = self._scores_by_step.get(self._loaded_step) or self.measure()
        if self._trainer.last_saved_step:  # the checkpoint's card has earlier scores, or none
            self._trainer.create_model_card()

    def measure(self) -> Scores:
        """Generate responses with the current weights, score them, and keep both in `responses` and `scores`.

        Raises:
            RuntimeError: If the model cannot generate. During training a checkpoint is saved first.
        """
        state = self._trainer.state
        step = state.global_step if self._loaded_step is None else self._loaded_step
        start = time.perf_counter()
        results = self._respond(self._prompt_ids, self._max_new_tokens, self._judge)
        self.responses = [response for response, _, _ in results]
        unscored = []
        for number, (_, _, error) in enumerate(results, start=1):
            if error is None:
                continue
            unscored.append(number)
            logger.error(
                f"Got an error of the scorer on row {number} of the held-out prompts, expected verdicts: the row counts as following "
                f"none of its constraints in the scores of step {step}. Fix: correct the scorer (callback.responses[{number - 1}] is the "
                f"response).\n{error}"
            )
        self.scores = self._scores_by_step[step] = Scores(
            benchmark=self.benchmark,
            dataset_name=self._dataset_name,
            step=step,
            counts=Counts.of([verdict for _, verdict, _ in results]),
            unscored=tuple(unscored),
            max_new_tokens=self._max_new_tokens,
            seconds=time.perf_counter() - start,
        )
        return self.scores

    def has_scored(self, step: int) -> bool:
        """Whether this training has scored the weights after that step."""
        return step in self._scores_by_step

    def _respond(self, prompts: list[list[int]], max_new_tokens: int, judge: Callable[[int, str], Any]) -> list[Any]:
        try:
            return respond_in_training(self._trainer, prompts, self._batch_size, max_new_tokens, judge)
        except Exception as error:
            if self._trainer.is_in_train:
                error.add_note(self._trainer.save_before_failing())
            raise

    def _judge(self, number: int, response: str) -> tuple[str, Verdict, str | None]:
        """Return the response, its verdict, and the scorer's traceback if it failed."""
        expected = self._constraint_counts[number]
        try:
            verdict = self._score(self._rows[number], response)
            if len(verdict.strict) != expected:
                raise ValueError(f"Got {len(verdict.strict)} verdicts, expected {expected} as for other responses.")
        except Exception:  # whatever a user's scorer raises: it must not end a long training
            none_followed = (False,) * expected
            return response, Verdict(none_followed, none_followed), traceback.format_exc()
        return response, verdict, None

    def _try_scorer(self, row: HeldOutRow, number: int) -> int:
        """Score a row with trial responses, and return the number of its constraints."""
        counts = set()
        for response in _TRIAL_RESPONSES:
            try:
                counts.add(len(self._score(row, response).strict))
            except Exception as error:
                raise ValueError(
                    f"Got {type(error).__name__} ({error}) from the scorer on row {number} of the held-out prompts with the response "
                    f"{response!r}, expected verdicts. Fix: correct the row or the scorer."
                ) from error
        if len(counts) > 1 or 0 in counts:
            raise ValueError(
                f"Got {sorted(counts)} verdicts from the scorer on row {number} of the held-out prompts for the responses {_TRIAL_RESPONSES}, "
                "expected the same number for every response, at least one. Fix: correct the row or the scorer."
            )
        return counts.pop()


class ScoredEvaluations(_Trainer):
    """A layer of MISOSFTTrainer that adds the scores of its MISOEvalCallbacks to the metrics of its evaluations.

    The event `on_evaluate` would be too late: metrics are logged by then, and EarlyStoppingCallback may have read them.
    """

    _evaluating = False
    _pending_prefix: str | None = None  # metric prefix of the current evaluation, until its prompts are scored

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As SFTTrainer's, with the scores of MISOEvalCallbacks among the metrics."""
        if self._evaluating:  # called by `evaluate` for one of several evaluation sets
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._evaluating, self._pending_prefix = True, metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluating, self._pending_prefix = False, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        prefix, self._pending_prefix = self._pending_prefix, None
        if prefix is not None:
            for callback in callbacks_of(self):
                output.metrics.update(callback.measure().metrics(prefix))
        return output

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self.terminated:  # after SIGTERM there may be no time to generate
            for callback in callbacks_of(self):
                self._score_last_step(callback)
        return super()._finalize_training(*args, **kwargs)

    def _score_last_step(self, callback: MISOEvalCallback) -> None:
        """Score the final weights, unless an evaluation did, and log the metrics before trackers close."""
        step = self.state.global_step
        if callback.has_scored(step):
            return
        with self.interruptible():
            metrics, training = callback.measure().metrics("eval"), self.model.training
        if not any(entry["step"] == step and metrics.keys() <= entry.keys() for entry in self.state.log_history):
            self.model.eval()  # in training mode, TRL's `log` would add its training metrics to the entry
            self.log(metrics)
            self.model.train(training)


def callbacks_of(trainer: Any) -> list[MISOEvalCallback]:
    """Return the trainer's MISOEvalCallbacks."""
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, MISOEvalCallback)]


def _check_trainer(trainer: Any) -> None:
    if not isinstance(trainer, ScoredEvaluations):
        raise ValueError(
            f"Got a trainer of type {type(trainer).__name__}, expected a MISOSFTTrainer, which adds the scores to its evaluations. Fix: use "
            "MISOSFTTrainer; with context_mode='single' it is plain SFT."
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "Got MISOEvalCallback under FSDP version 1, whose models cannot generate. Expected version 2. Fix: set fsdp_version: 2."
        )
    if not trainer._tokenizer.chat_template:
        raise ValueError(
            "Got a tokenizer without a chat template, expected one: a held-out prompt is a user turn. Fix: set chat_template_path, or "
            "leave MISOEvalCallback out."
        )


def _benchmark_of(benchmark: str | None, score: Score | None) -> str:
    """Return the name of the metrics."""
    if score is not None:
        if benchmark is not None:
            raise ValueError(
                f"Got benchmark={benchmark!r} beside a scorer, expected one of both. Fix: leave one out; own scores are named 'constraints'."
            )
        return "constraints"
    if benchmark not in (None, "ifeval", "ifbench"):
        raise ValueError(
            f"Got benchmark={benchmark!r}, expected 'ifeval' or 'ifbench'. Fix: give one of these, or a scorer."
        )
    return benchmark or "ifeval"


def _load_scorer(benchmark: str, rows: Sequence[HeldOutRow]) -> Scorer:
    return ifbench.load_scorer(rows) if benchmark == "ifbench" else ifeval.load_scorer()


def _check_at_least_1(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"Got {name}={count}, expected at least 1. Fix: raise {name}, or leave it out.")


def _held_out_rows(prompts: Iterable[Mapping[str, Any]], num_prompts: int | None) -> list[HeldOutRow]:
    """Take the first rows, and number those without a key: IFEval's scorer seeds its random draws by the key."""
    rows = [{"key": number} | checkable(row)[0] for number, row in enumerate(islice(prompts, num_prompts), start=1)]
    if not rows or len(rows) < (num_prompts or 1):
        raise ValueError(
            f"Got {len(rows)} held-out prompts with num_prompts={num_prompts}, expected at least {num_prompts or 1}. Fix: give more rows, or "
            "lower num_prompts."
        )
    return rows


def _prompt_ids(trainer: Any, row: HeldOutRow, number: int) -> list[int]:
    """Render a prompt by the chat template that is saved with the model, and tokenize it."""
    prompt = row.get("prompt")
    if not prompt or not isinstance(prompt, str | list):
        raise ValueError(
            f"Got row {number} of the held-out prompts with prompt={prompt!r}, expected text, or messages. Fix: correct the row."
        )
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    render = trainer._tokenizer.apply_chat_template
    try:
        return render(chat, add_generation_prompt=True, return_dict=True, **template_kwargs(row))["input_ids"]
    except Exception as error:  # a template may raise any error
        raise ValueError(
            f"Got {type(error).__name__} ({error}) from the chat template on row {number} of the held-out prompts, expected messages "
            "that the template accepts. Fix: correct the row."
        ) from error


def _verdict_of(score: Score, row: HeldOutRow, response: str) -> Verdict:
    """Call the user's scorer; its verdicts count as both strict and loose."""
    scores = score(row, response)
    marks = tuple(scores.values() if isinstance(scores, Mapping) else scores)
    if not all(isinstance(mark, bool | np.bool_) for mark in marks):
        raise ValueError(f"Got {scores!r}, expected a list or dict of bools, one per constraint.")
    followed = tuple(bool(mark) for mark in marks)
    return Verdict(followed, followed)
