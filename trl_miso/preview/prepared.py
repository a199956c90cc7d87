"""Rows as `MISOSFTTrainer` prepares them, as plain data for the terminal and the page."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTTrainer, clone_chat_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from trl_miso.attention.support import why_not_share
from trl_miso.config import MISOSFTConfig
from trl_miso.data.dropped import STATUS, AnyDataset, Dropped, count_statuses
from trl_miso.data.pipeline import Pipeline, check_dataset, check_first_row, check_packing, first_row
from trl_miso.data.schema import is_conversation, row_format
from trl_miso.data.sft_settings import check_rows, check_token, check_tokens, pad_token
from trl_miso.data.token_text import token_texts
from trl_miso.data.turns import count_own_settings, describe_train_turns
from trl_miso.preview.answers import answers_of, context_names, cut_ends
from trl_miso.preview.statistics import Baseline, ModelShape, dataset_statistics
from trl_miso.segments import Example, decode


def preview_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: MISOSFTConfig,
    shape: ModelShape,
    *,
    name: str = "train",
    rows: int = 5,
    complete: bool = True,
    shares_prefixes: bool = True,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Prepare a dataset as training would, through the same pipeline, and describe the result.

    Args:
        dataset: Rows in any format of `trl_miso.data.schema`.
        shape: The model's shape, to estimate the cost of a step.
        name: What to call the dataset.
        rows: How many rows to show. The first row dropped for each reason, and the first row cut, are shown besides.
        complete: Whether `dataset` is the whole dataset.
        shares_prefixes: Whether the model allows to compute common prefixes once.
        warnings: What to show before the statistics.

    Returns:
        `{"statistics": ..., "rows": [...]}`, all values JSON-compatible. A row has its `ids`, `texts` and `labels` in
        packed order, its `segments` and `answers` (`answers.answers_of`; with the texts of the tokens that were `cut`), the
        number of tokens `cut` from all answers and of those `saved` by sharing, and `notes`; or the reason why it was `dropped`.

    Raises:
        ValueError: As `MISOSFTTrainer`, for settings or rows that cannot be trained on; for a stream; for rows that were
            prepared before.
    """
    _check(dataset, args, name)
    # Training sets a chat template, a pad token, ... on the tokenizer it is given.
    tokenizer, chat_template = _training_tokenizer(deepcopy(tokenizer), args)
    pipeline = Pipeline.of(
        args,
        tokenizer,
        _SFTPreparation(tokenizer, chat_template, args, dataset.column_names),
        chat_template=chat_template,
        vocab_size=_vocab_size(tokenizer, args, shape),
        shares_prefixes=shares_prefixes and args.share_prefixes and not _noise(args),
    )
    return _Preview(dataset, pipeline, args, shape, name, rows, complete, warnings).build()


def _check(dataset: Dataset, args: MISOSFTConfig, name: str) -> None:
    """Refuse a dataset without rows to prepare; everything else as training refuses it."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"Got {name} as {type(dataset).__name__}, expected a Dataset, whose rows can be counted. Fix: preview the first rows of "
            "a stream, Dataset.from_list(list(stream.take(1000)))."
        )
    if "miso_layout" in dataset.column_names or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        raise ValueError(
            f"Got {name}, which is prepared already and no longer has its raw rows, expected raw rows. Fix: preview the "
            "dataset it was prepared from, without skip_prepare_dataset."
        )
    check_first_row(dataset, args.assistant_only_loss)
    check_rows(args, first_row(dataset, "train"))
    check_dataset(dataset, "train")
    check_packing(args.packing, args.max_length)


def _vocab_size(tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig, shape: ModelShape) -> int:
    """The model's vocabulary, or the tokenizer's if the shape does not tell it or a chat template adds tokens."""
    if shape.vocab_size is None or args.chat_template_path is not None:
        return 1 + max(tokenizer.get_vocab().values())  # some vocabularies have gaps
    return shape.vocab_size


def _noise(args: MISOSFTConfig) -> str:
    """Why noise of the settings, apart from the model's, forbids shared prefixes; empty if it does not."""
    return why_not_share(None, LlamaConfig(), args.neftune_noise_alpha)


def _training_tokenizer(
    tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig
) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer as SFTTrainer sets it up, and the chat template that replaces its own, in the same order."""
    check_tokens(args, tokenizer)
    if args.eos_token is not None:
        tokenizer.eos_token = args.eos_token
    path = args.chat_template_path
    if path is not None and path.endswith((".jinja", ".j2")) and Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    elif path is not None:
        # TRL adds the tokens of the other tokenizer, and fills the vocabulary up to the model's resized embeddings.
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
        _, tokenizer, _ = clone_chat_template(model, tokenizer, path)
    chat_template = None
    if args.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        chat_template = get_training_chat_template(tokenizer)
    padding = pad_token(args, tokenizer)
    check_token(tokenizer, "pad_token", padding)
    tokenizer.pad_token = padding
    return tokenizer, chat_template


@dataclass
class _SFTPreparation:
    """TRL's own preparation of rows without a trainer: the attributes that `SFTTrainer._prepare_dataset` reads."""

    _tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    args: MISOSFTConfig
    columns: list[str]
    completion_only_loss: bool = False

    def __call__(
        self, rows: AnyDataset, tokenizer: PreTrainedTokenizerBase, name: str, completions_only: bool
    ) -> AnyDataset:
        has_both = {"prompt", "completion"} <= set(self.columns)
        setting = self.args.completion_only_loss
        self.completion_only_loss = completions_only or (has_both if setting is None else setting)
        uncut = copy(self.args)
        uncut.max_length, uncut.shuffle_dataset = None, False
        return SFTTrainer._prepare_dataset(self, rows, tokenizer, uncut, False, None, name)


@dataclass(frozen=True)
class _Preview:
    """Everything that a preview is built from."""

    dataset: Dataset
    pipeline: Pipeline
    args: MISOSFTConfig
    shape: ModelShape
    name: str
    num_rows: int
    complete: bool
    warnings: Sequence[str]

    def build(self) -> dict[str, Any]:
        # Neither shuffled nor packed, so that prepared rows keep the order of the raw rows.
        prepared = replace(self.pipeline, shuffle_seed=None)(self.dataset, "train")
        dropped = prepared.dropped or {}
        if prepared.mode == "single":
            baseline = Baseline.of(prepared.rows)
        else:
            # Plain SFT may be unable to train on some rows, whose full context is the longest: cut by the baseline itself.
            baseline = Baseline.of(self._as_sft(prepared.mode), self.args.max_length)
        statistics = dataset_statistics(
            prepared.rows,
            mode=prepared.mode,
            baseline=baseline,
            shape=self.shape,
            shared=self.pipeline.shares_prefixes,
        )
        if self.args.packing:
            statistics["bins"] = self._bins(prepared.rows, statistics)
        statuses = count_statuses(self.dataset) if STATUS in self.dataset.column_names else {}
        statistics |= {
            "dataset": self.name,
            "model": self.shape.name,
            "rows": len(self.dataset),
            "complete": self.complete,
            "train_turns": self._train_turns(prepared.mode),
            "warnings": list(self.warnings),
            "statuses": dict(statuses),
            "dropped": {why: {"rows": len(set(which)), "first_row": which[0]} for why, which in dropped.items()},
        }
        return {"statistics": statistics, "rows": list(self._rows(prepared.rows, prepared.mode, dropped))}

    def _bins(self, prepared: Dataset, statistics: dict[str, Any]) -> dict[str, Any]:
        layouts = prepared.select_columns("miso_layout")
        for column in ("input_ids", "labels"):  # tokens need not be copied to count bins
            layouts = layouts.add_column(column, [[]] * len(layouts))
        bins, max_length = len(self.pipeline.pack(layouts)), self.args.max_length
        return {
            "max_length": max_length,
            "bins": bins,
            "filled": statistics["tokens"]["unique"] / (bins * max_length),
            "examples_per_bin": round(statistics["examples"] / bins, 1),
        }

    def _uncut(self, dataset: Dataset, mode: str) -> Dataset:
        """Rows prepared in `mode`, whose ends are not cut off."""
        return self._prepared(dataset, None, context_mode=mode, max_length=None)

    def _as_sft(self, mode: str) -> Dataset:
        """Rows as plain SFT trains on them, a conversation or an answer to the full prompt as one run, whose ends are not cut off."""
        # Evaluation rows of standard inference are the full contexts that plain SFT trains on.
        return self._prepared(self.dataset, mode, context_mode=mode, max_length=None, train_turns="last")

    def _prepared(self, dataset: Dataset, training_mode: str | None, **options: Any) -> Dataset:
        """Rows prepared a second time, with other options."""
        options = {
            "options": replace(self.pipeline.options, **options),
            "shuffle_seed": None,
            "eval_contexts": "standard",
        }
        with _quiet():
            return replace(self.pipeline, **options)(dataset, "train", training_mode).rows

    @property
    def _kind(self) -> str:
        return row_format(self.dataset.column_names, self.args.dataset_text_field)

    def _train_turns(self, mode: str) -> str:
        """Which answers of these rows are trained, in a sentence."""
        if mode in ("single", "augment"):
            return f"no effect in {mode}, whose labels are those of SFTTrainer"
        own = self.dataset["train_turns"][:] if "train_turns" in self.dataset.column_names else []
        in_messages = is_conversation(self._kind, self.dataset.column_names)
        return describe_train_turns(self.args.train_turns, in_messages, count_own_settings(own))

    def _rows(self, prepared: Dataset, mode: str, dropped: Dropped) -> Iterator[dict[str, Any]]:
        """The first rows, then one dropped for each reason, then the first that was cut and the first with each note."""
        facts = prepared.select_columns(["miso_row", "miso_cut", "miso_notes"])[:]
        numbers, cuts = ([first for (first,) in facts[name]] for name in ("miso_row", "miso_cut"))
        noted: dict[str, int] = {}
        for number, notes in zip(numbers, facts["miso_notes"], strict=True):
            for note in notes:
                noted.setdefault(note, number)
        to_show = list(range(min(self.num_rows, len(self.dataset))))
        if self.num_rows:
            to_show += [which[0] for which in dropped.values()]
            to_show += [number for number, cut in zip(numbers, cuts, strict=True) if cut][:1]
            to_show += noted.values()
        dataset = self.dataset.with_format(None)
        for number in dict.fromkeys(to_show):
            raw = dataset[number]
            common = {"index": number, "status": raw.get(STATUS) or "", "dropped": "", "raw": ""}
            for i, row_number in enumerate(numbers):
                if row_number == number:
                    yield common | self._prepared_row(prepared[i], mode, raw)
            # In augment mode some contexts of a row may be dropped and others not.
            for reason, which in dropped.items():
                if number in which:
                    lists = ("ids", "texts", "labels", "segments", "answers", "notes")
                    empty: dict[str, Any] = {name: [] for name in lists} | {"cut": 0, "saved": 0}
                    yield common | {"mode": mode, "dropped": reason, "raw": _excerpt(raw)} | empty

    def _prepared_row(self, row: dict[str, Any], mode: str, raw: dict[str, Any]) -> dict[str, Any]:
        example, ids, labels = first = _first_example(row)
        names = context_names(raw, self._kind, mode, self.pipeline.options)
        answers = answers_of(example, labels, names)
        (cut,) = row["miso_cut"]
        if cut and self.args.truncation_mode == "keep_start":
            uncut = self._uncut(self.dataset.with_format(None).select(row["miso_row"]), mode)
            for answer, end in zip(answers, cut_ends(first, map(_first_example, uncut), names), strict=True):
                answer["cut"] = token_texts(end, self.pipeline.tokenizer)
        return {
            "mode": mode if example.outputs or mode == "augment" else "single",
            "notes": row["miso_notes"],
            "cut": cut,
            "saved": example.num_unshared_tokens - example.num_tokens if self.pipeline.shares_prefixes else 0,
            "ids": ids,
            "texts": token_texts(ids, self.pipeline.tokenizer),
            "labels": labels,
            "segments": [segment._asdict() for segment in example.segments],
            "answers": answers,
        }


def _first_example(row: dict[str, Any]) -> tuple[Example, list[int], list[int]]:
    """Example, ids and labels of a prepared row. A row that TRL packed before holds several: the first of them is shown."""
    example = next(decode(row["miso_layout"]))
    return example, row["input_ids"][: example.num_tokens], row["labels"][: example.num_tokens]


@contextmanager
def _quiet() -> Iterator[None]:
    """Log nothing a second time where rows are prepared again."""
    logger = logging.getLogger("trl_miso")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _excerpt(row: dict[str, Any], length: int = 600) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= length else f"{text[:length]} ... ({len(text):,} characters)"
