"""Rows as `MISOSFTTrainer` prepares them, as plain data for the terminal and the page."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTTrainer, clone_chat_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import is_conversational

from trl_miso.attention.support import why_not_share
from trl_miso.config import MISOSFTConfig
from trl_miso.data.dropped import STATUS, AnyDataset, Dropped, count_statuses
from trl_miso.data.pipeline import Pipeline, check_dataset, check_packing, first_row
from trl_miso.data.token_text import token_texts
from trl_miso.preview.statistics import Baseline, ModelShape, dataset_statistics
from trl_miso.segments import decode


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
) -> dict[str, Any]:
    """Prepare a dataset as training would, through the same pipeline, and describe the result.

    Args:
        dataset: Rows in any format of `trl_miso.data.schema`.
        shape: The model's shape, to estimate the cost of a step.
        name: What to call the dataset.
        rows: How many rows to show. The first row dropped for each reason, and the first row cut, are shown besides.
        complete: Whether `dataset` is the whole dataset.
        shares_prefixes: Whether the model allows to compute common prefixes once.

    Returns:
        `{"statistics": ..., "rows": [...]}`, all values JSON-compatible. A row has its `ids`, `texts` and `labels` in
        packed order, its `segments` and `contexts` (the branches of `trl_miso.segments`), and the texts of the tokens that
        were `cut`; or the reason why it was `dropped`.

    Raises:
        ValueError: As `MISOSFTTrainer`, for settings or rows that cannot be trained on; for a stream; for rows that were
            prepared before.
    """
    _check(dataset, args, name)
    # Training sets a chat template, a pad token, ... on the tokenizer it is given.
    tokenizer, chat_template = _training_tokenizer(deepcopy(tokenizer), args, first_row(dataset, name))
    pipeline = Pipeline.of(
        args,
        tokenizer,
        _SFTPreparation(tokenizer, chat_template, args, dataset.column_names),
        chat_template=chat_template,
        vocab_size=1 + max(tokenizer.get_vocab().values()),  # some vocabularies have gaps
        shares_prefixes=shares_prefixes and args.share_prefixes and not _noise(args),
    )
    return _Preview(dataset, pipeline, args, shape, name, rows, complete).build()


def _check(dataset: Dataset, args: MISOSFTConfig, name: str) -> None:
    """Refuse a dataset without rows to show, or without rows to prepare."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"Got {name} as {type(dataset).__name__}, expected a Dataset, whose rows can be counted. Fix: preview the first rows of "
            "a stream, Dataset.from_list(list(stream.take(1000)))."
        )
    if not len(dataset):
        raise ValueError(f"Got no rows in {name}, expected at least one. Fix: check the file or the split.")
    if "miso_layout" in dataset.column_names or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        raise ValueError(
            f"Got {name}, which is prepared already and no longer has its raw rows, expected raw rows. Fix: preview the "
            "dataset it was prepared from, without skip_prepare_dataset."
        )
    check_dataset(dataset, name)
    check_packing(args.packing, args.max_length)
    if args.padding_free and not args.packing and args.max_length is not None:
        raise ValueError(
            f"Got padding_free=True without packing and max_length={args.max_length}, which TRL does not enforce then. Expected "
            "packing=True or max_length=None. Fix: leave padding_free out, since MISO's batches have no padding."
        )


def _noise(args: MISOSFTConfig) -> str:
    """Why noise of the settings, apart from the model's, forbids shared prefixes; empty if it does not."""
    return why_not_share(None, LlamaConfig(), args.neftune_noise_alpha)


def _training_tokenizer(
    tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig, row: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer as SFTTrainer sets it up, and the chat template that replaces its own, in the same order.

    Raises:
        ValueError: As SFTTrainer, for tokens that the vocabulary lacks and rows without assistant turns to label.
    """
    if args.eos_token is not None:
        _check_token(tokenizer, "eos_token", args.eos_token)
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
    if args.assistant_only_loss:
        if not is_conversational(row):
            raise ValueError(
                "Got assistant_only_loss=True and rows that are not conversations, expected messages. Fix: leave "
                "assistant_only_loss out, or convert the rows."
            )
        if not has_generation_markers(tokenizer.chat_template):
            chat_template = get_training_chat_template(tokenizer)
    pad_token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    _check_token(tokenizer, "pad_token", pad_token)
    tokenizer.pad_token = pad_token
    return tokenizer, chat_template


def _check_token(tokenizer: PreTrainedTokenizerBase, name: str, token: str | None) -> None:
    if token not in tokenizer.get_vocab():
        raise ValueError(f"Got {name}={token!r}, expected a token of the vocabulary. Fix: correct {name}.")


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

    def build(self) -> dict[str, Any]:
        # Neither shuffled nor packed, so that prepared rows keep the order of the raw rows.
        prepared = replace(self.pipeline, shuffle_seed=None)(self.dataset, "train")
        dropped = prepared.dropped or {}
        if prepared.mode == "single":
            baseline = Baseline.of(prepared.rows)
        else:
            # Plain SFT may be unable to train on some rows, whose full context is the longest: cut by the baseline itself.
            baseline = Baseline.of(self._uncut(self.dataset, prepared.mode, as_sft=True), self.args.max_length)
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

    def _uncut(self, dataset: Dataset, mode: str, as_sft: bool = False) -> Dataset:
        """Rows prepared in `mode`, or as plain SFT on the full prompts, whose ends are not cut off."""
        options = replace(self.pipeline.options, context_mode=mode, max_length=None)
        pipeline = replace(self.pipeline, options=options, shuffle_seed=None, eval_contexts="standard")
        with _quiet():
            # Evaluation rows of standard inference are the full contexts that plain SFT trains on.
            return pipeline(dataset, "train", training_mode=mode if as_sft else None).rows

    def _rows(self, prepared: Dataset, mode: str, dropped: Dropped) -> Iterator[dict[str, Any]]:
        """The first rows, then one dropped for each reason, then the first that was cut."""
        numbers = [
            number for batch in prepared.select_columns("miso_row").iter(1000) for (number,) in batch["miso_row"]
        ]
        cuts = [cut for batch in prepared.select_columns("miso_cut").iter(1000) for (cut,) in batch["miso_cut"]]
        to_show = list(range(min(self.num_rows, len(self.dataset))))
        if self.num_rows:
            to_show += [which[0] for which in dropped.values()]
            to_show += [number for number, cut in zip(numbers, cuts, strict=True) if cut][:1]
        dataset = self.dataset.with_format(None)
        for number in dict.fromkeys(to_show):
            raw = dataset[number]
            common: dict[str, Any] = {
                "index": number,
                "status": raw.get(STATUS) or "",
                "dropped": "",
                "raw": "",
                "cut": [],
            }
            for i, row_number in enumerate(numbers):
                if row_number == number:
                    row = self._prepared_row(prepared[i], mode)
                    if cuts[i]:
                        row["cut"] = self._cut_texts(dataset, mode, number, row["ids"])
                    yield common | row
            # In augment mode some contexts of a row may be dropped and others not.
            for reason, which in dropped.items():
                if number in which:
                    empty: dict[str, list] = {key: [] for key in ("ids", "texts", "labels", "segments", "contexts")}
                    yield common | {"mode": mode, "dropped": reason, "raw": _excerpt(raw)} | empty

    def _cut_texts(self, dataset: Dataset, mode: str, number: int, ids: list[int]) -> list[str]:
        """The texts of the tokens that were cut off after `ids`; none where the start of rows is cut."""
        if self.args.truncation_mode != "keep_start":
            return []
        for uncut_ids in self._uncut(dataset.select([number]), mode)["input_ids"]:
            if uncut_ids[: len(ids)] == ids:
                return token_texts(uncut_ids[len(ids) :], self.pipeline.tokenizer)
        raise AssertionError("a cut row is the beginning of the row before it was cut")

    def _prepared_row(self, row: dict[str, Any], mode: str) -> dict[str, Any]:
        # A row that TRL packed before holds several runs: the first of them is shown.
        example = next(decode(row["miso_layout"]))
        ids, labels = row["input_ids"][: example.num_tokens], row["labels"][: example.num_tokens]
        return {
            "mode": mode if example.branches or mode == "augment" else "single",
            "ids": ids,
            "texts": token_texts(ids, self.pipeline.tokenizer),
            "labels": labels,
            "segments": [segment._asdict() for segment in example.segments],
            "contexts": [branch._asdict() for branch in example.branches],
        }


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
