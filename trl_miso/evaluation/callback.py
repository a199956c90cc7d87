"""Held-out prompts answered and scored while a model is trained, by standard inference: `MISOEvalCallback`."""

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

from trl_miso.data.contexts import template_kwargs
from trl_miso.evaluation.backends import check_length
from trl_miso.evaluation.ifeval import Counts, Verdict, load_scorer
from trl_miso.evaluation.in_training import preserve_rng, respond_in_training

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

HeldOutRow = dict[str, Any]
Score = Callable[[HeldOutRow, str], Mapping[str, bool] | Sequence[bool]]

_ACCURACIES = {
    "ifeval": ("prompt_strict", "inst_strict", "prompt_loose", "inst_loose", "average"),
    "constraints": ("prompt", "inst"),
}
_TRIED = ("", "Yes.")  # responses that every row is scored with before anything is trained

logger = get_logger(__name__)


@dataclass(frozen=True)
class Scores:
    """What a model made of the held-out prompts after `step` steps of training.

    `benchmark` is "ifeval", or "constraints" where the user's own scorer judged (strict and loose are then one); `unscored` are the
    rows, from 1, on which it failed, and which count as following nothing; `seconds` is what responses and verdicts took.
    """

    benchmark: str
    dataset_name: str | None
    step: int
    counts: Counts
    unscored: tuple[int, ...]
    max_new_tokens: int
    seconds: float

    def metrics(self, prefix: str) -> dict[str, float]:
        """As logged: accuracies from 0 to 1, of prompts all of whose instructions are followed and of instructions."""
        accuracies = [percentage / 100 for percentage in self.counts.percentages()]
        values = dict(zip(_ACCURACIES[self.benchmark], [*accuracies, fmean(accuracies)], strict=False))
        values |= {"unscored": len(self.unscored), "runtime": round(self.seconds, 4)}
        return {f"{prefix}_{self.benchmark}_{name}": value for name, value in values.items()}


class MISOEvalCallback(TrainerCallback):
    """Scores the model in training on held-out prompts, by standard inference: the plain model on the plain prompt, greedy.

        >>> config = MISOSFTConfig(
        ...     eval_strategy="steps", eval_steps=200, save_steps=200,
        ...     load_best_model_at_end=True, metric_for_best_model="eval_ifeval_prompt_strict",
        ... )
        >>> trainer = MISOSFTTrainer(model, config, train_dataset=rows, eval_dataset=few_rows)
        >>> trainer.add_callback(MISOEvalCallback(trainer, load_prompts(None), num_prompts=100, dataset_name="google/IFEval"))

    Each evaluation of the trainer (`eval_strategy`, `eval_on_start`, `trainer.evaluate()`) then has these metrics beside its loss, in
    what it returns and in what is logged to the trackers of `report_to`; so `metric_for_best_model`, `save_strategy="best"` and
    EarlyStoppingCallback go by them. Without `eval_strategy` the model is scored once, after the last step. The model card has the
    scores of the weights that training ends with, those of the best checkpoint if that is loaded.

    | metric | |
    | --- | --- |
    | `eval_ifeval_prompt_strict`, `eval_ifeval_prompt_loose` | share of prompts all of whose instructions are followed |
    | `eval_ifeval_inst_strict`, `eval_ifeval_inst_loose` | share of instructions that are followed |
    | `eval_ifeval_average` | mean of these four |
    | `eval_ifeval_unscored` | prompts on which the scorer failed |
    | `eval_ifeval_runtime` | seconds that all this took, which `eval_runtime` includes |

    With a scorer of your own: `eval_constraints_prompt`, `eval_constraints_inst`, `..._unscored` and `..._runtime`.

    Equals, at each evaluation, `trl-miso eval ifeval --model CHECKPOINT` on the same rows, up to rounding where training's precision is
    not that of the checkpoint. What is trained is the same without it, bit for bit. It costs what generation costs: ceil(prompts /
    batch_size / processes) batches of up to `max_new_tokens` forwards each, and the memory of a cache for `batch_size` rows; under FSDP2
    and DeepSpeed ZeRO-3 every forward gathers the weights.

    Args:
        trainer ([`MISOSFTTrainer`]): The trainer that the callback is added to.
        prompts: Rows with `prompt` (text of a user turn, or messages) and, for IFEval's checkers, `instruction_id_list` and `kwargs`
            (`trl_miso.evaluation.ifeval.load_prompts` reads IFEval's own). `tools` and `chat_template_kwargs` are honoured.
        score: A function of a row and a response that says for each of the row's constraints whether it is followed, in a list
            or dict of bools, always as many. Without it, IFEval's checkers of lm-eval. Called on every process, for its share.
        num_prompts: Take the first of the rows only.
        max_new_tokens: Of a response.
        batch_size: Prompts that a process answers at once.
        dataset_name: Where the prompts are from, for the model card. The name of a data set on the Hub is also metadata of the card.

    Attributes:
        scores ([`Scores`], *optional*): The last ones; after training, those of the weights it ended with.
        responses (list of str): The last ones, one a row.

    Raises:
        ValueError: For rows that cannot be asked or scored (each is scored with a response made up), a tokenizer without a chat
            template, missing packages or data of lm-eval. When training begins, for a `metric_for_best_model` that is not among those above.
        RuntimeError: If the model cannot generate; tried with the longest prompt when training begins. A checkpoint is saved first.

    A scorer that fails in the midst of training does not end it: the row counts as following nothing, an error with the row's number
    is logged, and `eval_ifeval_unscored` counts it.
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
    ):
        _check_trainer(trainer)
        _check_at_least_1(
            num_prompts=1 if num_prompts is None else num_prompts, max_new_tokens=max_new_tokens, batch_size=batch_size
        )
        self.benchmark = "ifeval" if score is None else "constraints"
        self.scores: Scores | None = None
        self.responses: list[str] = []
        self._trainer, self._dataset_name = trainer, dataset_name
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        self._score = load_scorer() if score is None else partial(_own_verdict, score)
        self._rows = _rows(prompts, num_prompts)
        self._tokens = [_tokens(trainer, row, number) for number, row in enumerate(self._rows, start=1)]
        check_length(trainer.model.config, max(map(len, self._tokens)), max_new_tokens)
        with preserve_rng():
            self._constraints = [self._try(row, number) for number, row in enumerate(self._rows, start=1)]
        self._by_step: dict[int, Scores] = {}
        self._loaded_step: int | None = None  # of the best checkpoint, once training has ended with its weights

    def on_train_begin(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        self._by_step, self._loaded_step, self.scores = {}, None, None
        if sum(other.benchmark == self.benchmark for other in callbacks_of(self._trainer)) > 1:
            raise ValueError(
                f"Got several MISOEvalCallbacks that score {self.benchmark}, expected one: their metrics have the same names. Fix: join "
                "their prompts, and let the scorer tell the rows apart."
            )
        self._check_best(args.metric_for_best_model or "")
        self._respond([max(self._tokens, key=len)], 2, lambda number, response: None)

    def _check_best(self, metric: str) -> None:
        """What looks like a score has to be one of those that there will be; a set of this name has a loss only."""
        wanted = f"eval_{metric.removeprefix('eval_')}"
        sets = self._trainer.eval_dataset
        scored = _ACCURACIES.keys() - (sets.keys() if isinstance(sets, dict) else ())
        made = callbacks_of(self._trainer)
        names = [f"eval_{other.benchmark}_{name}" for other in made for name in _ACCURACIES[other.benchmark]]
        if wanted.startswith(tuple(f"eval_{benchmark}_" for benchmark in scored)) and wanted not in names:
            raise ValueError(
                f"Got metric_for_best_model={metric!r}, expected one of {names}. Fix: set it to one of these."
            )

    def on_train_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if self._trainer._watch.terminated:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # Not best_global_step, which may have no checkpoint of its own.
            self._loaded_step = int(Path(state.best_model_checkpoint).name.rpartition("-")[2])
            known = self._by_step.get(self._loaded_step)  # unless it is from before training was resumed
            self.scores = known or self.measure()
        if self._trainer._saved_step:  # with a card, which is of before
            self._trainer.create_model_card()

    def measure(self) -> Scores:
        """Ask the model as it is now, score what it responds, and keep both.

        Raises:
            RuntimeError: If the model cannot generate. In the midst of training a checkpoint is saved first.
        """
        state = self._trainer.state
        step = state.global_step if self._loaded_step is None else self._loaded_step
        start = time.perf_counter()
        judged = self._respond(self._tokens, self._max_new_tokens, self._judge)
        self.responses = [response for response, _, _ in judged]
        failures = {number: failed for number, (_, _, failed) in enumerate(judged, start=1) if failed}
        for number, failed in failures.items():
            logger.error(
                f"Got an error of the scorer on row {number} of the held-out prompts, expected verdicts: the row counts as following "
                f"none of its constraints in the scores of step {step}. Fix: correct the scorer (callback.responses[{number - 1}] is the "
                f"response).\n{failed}"
            )
        self.scores = self._by_step[step] = Scores(
            benchmark=self.benchmark,
            dataset_name=self._dataset_name,
            step=step,
            counts=Counts.of([verdict for _, verdict, _ in judged]),
            unscored=tuple(failures),
            max_new_tokens=self._max_new_tokens,
            seconds=time.perf_counter() - start,
        )
        return self.scores

    def has_scored(self, step: int) -> bool:
        """Whether the weights after that step of the training under way were scored."""
        return step in self._by_step

    def _respond(self, tokens: list[list[int]], max_new_tokens: int, judge: Callable[[int, str], Any]) -> list[Any]:
        try:
            return respond_in_training(self._trainer, tokens, self._batch_size, max_new_tokens, judge)
        except Exception as error:
            if self._trainer.is_in_train:
                error.add_note(self._trainer._save_before_failing())
            raise

    def _judge(self, number: int, response: str) -> tuple[str, Verdict, str | None]:
        expected = self._constraints[number]
        try:
            verdict = self._score(self._rows[number], response)
            if len(verdict.strict) != expected:
                raise ValueError(f"Got {len(verdict.strict)} verdicts, expected {expected} as for other responses.")
        except Exception:  # of the user's: days of training do not end for it
            none = (False,) * expected
            return response, Verdict(none, none), traceback.format_exc()
        return response, verdict, None

    def _try(self, row: HeldOutRow, number: int) -> int:
        """How many constraints a row has, scored with responses made up."""
        counts = set()
        for response in _TRIED:
            try:
                counts.add(len(self._score(row, response).strict))
            except Exception as error:
                raise ValueError(
                    f"Got {type(error).__name__} ({error}) from the scorer on row {number} of the held-out prompts with the response "
                    f"{response!r}, expected verdicts. Fix: correct the row or the scorer."
                ) from error
        if len(counts) > 1 or 0 in counts:
            raise ValueError(
                f"Got {sorted(counts)} verdicts from the scorer on row {number} of the held-out prompts for the responses {_TRIED}, "
                "expected as many for any response, at least one. Fix: correct the row or the scorer."
            )
        return counts.pop()


class ScoredEvaluations(_Trainer):
    """For MISOSFTTrainer: what its MISOEvalCallbacks measure are metrics of its evaluations.

    Not at `on_evaluate`, when metrics are logged already and EarlyStoppingCallback may have looked at them.
    """

    _evaluating = False
    _unscored_prefix: str | None = None  # of the evaluation under way, until its prompts are answered

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As SFTTrainer's, and scores the prompts of MISOEvalCallbacks."""
        if self._evaluating:  # one of several sets
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._evaluating, self._unscored_prefix = True, metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluating, self._unscored_prefix = False, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        prefix, self._unscored_prefix = self._unscored_prefix, None
        if prefix is not None:
            for callback in callbacks_of(self):
                output.metrics.update(callback.measure().metrics(prefix))
        return output

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self._watch.terminated:  # else there may be no time
            for callback in callbacks_of(self):
                self._score_last_step(callback)
        return super()._finalize_training(*args, **kwargs)

    def _score_last_step(self, callback: MISOEvalCallback) -> None:
        """Before trackers are told that training ends."""
        step = self.state.global_step
        if callback.has_scored(step):
            return
        metrics, training = callback.measure().metrics("eval"), self.model.training
        if not any(entry["step"] == step and metrics.keys() <= entry.keys() for entry in self.state.log_history):
            self.model.eval()  # by which TRL tells whose metrics to add
            self.log(metrics)
            self.model.train(training)


def callbacks_of(trainer: Any) -> list[MISOEvalCallback]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, MISOEvalCallback)]


def _check_trainer(trainer: Any) -> None:
    if not isinstance(trainer, ScoredEvaluations):
        raise ValueError(
            f"Got a trainer of type {type(trainer).__name__}, expected a MISOSFTTrainer, whose evaluations can have further metrics. Fix: "
            "use MISOSFTTrainer; with context_mode='single' it is plain SFT."
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "Got MISOEvalCallback under FSDP version 1, expected version 2: its models cannot generate. Fix: set fsdp_version: 2."
        )
    if not trainer._tokenizer.chat_template:
        raise ValueError(
            "Got a tokenizer without a chat template, expected one: a held-out prompt is a user turn. Fix: set chat_template_path, or "
            "leave MISOEvalCallback out."
        )


def _check_at_least_1(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"Got {name}={count}, expected at least 1. Fix: raise it, or leave it out.")


def _rows(prompts: Iterable[Mapping[str, Any]], num_prompts: int | None) -> list[HeldOutRow]:
    """With a key, from which IFEval's checkers draw what they leave to chance."""
    rows = [{"key": number} | dict(row) for number, row in enumerate(islice(prompts, num_prompts), start=1)]
    if not rows or len(rows) < (num_prompts or 1):
        raise ValueError(
            f"Got {len(rows)} held-out prompts with num_prompts={num_prompts}, expected at least {num_prompts or 1}. Fix: give more rows, or "
            "lower num_prompts."
        )
    return rows


def _tokens(trainer: Any, row: HeldOutRow, number: int) -> list[int]:
    """What the model is asked: the prompt in the chat template that is saved with the model."""
    prompt = row.get("prompt")
    if not prompt or not isinstance(prompt, str | list):
        raise ValueError(
            f"Got row {number} of the held-out prompts with prompt={prompt!r}, expected text, or messages. Fix: correct the row."
        )
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    render = trainer._tokenizer.apply_chat_template
    try:
        return render(chat, add_generation_prompt=True, return_dict=True, **template_kwargs(row))["input_ids"]
    except Exception as error:  # a template raises what it likes
        raise ValueError(
            f"Got {type(error).__name__} ({error}) from the chat template on row {number} of the held-out prompts, expected messages "
            "that it takes. Fix: correct the row."
        ) from error


def _own_verdict(score: Score, row: HeldOutRow, response: str) -> Verdict:
    said = score(row, response)
    marks = tuple(said.values() if isinstance(said, Mapping) else said)
    if not all(isinstance(mark, bool | np.bool_) for mark in marks):
        raise ValueError(f"Got {said!r}, expected a list or dict of bools, one for each constraint.")
    followed = tuple(map(bool, marks))
    return Verdict(followed, followed)
