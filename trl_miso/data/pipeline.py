"""The one door from a dataset to prepared rows, for every mode. The trainer, preview and the dry run all go through it."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, NamedTuple

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names

from trl_miso.data.bins import pack_rows
from trl_miso.data.columns import report_unread
from trl_miso.data.contexts import full_row, parallel_row, resolve_mode
from trl_miso.data.dropped import (
    SAMPLE,
    STATUS,
    AnyDataset,
    Dropped,
    count_statuses,
    report_mixture,
    report_statuses,
)
from trl_miso.data.mapping import naming, same_columns
from trl_miso.data.mixed import report_held, warn_unless_mixed
from trl_miso.data.options import DataOptions
from trl_miso.data.preparation import RowPreparation, fit_rows, prepare_rows
from trl_miso.data.schema import RowDropped, is_conversation, row_format
from trl_miso.data.settings import check_effects, check_weights
from trl_miso.data.sft_rows import SFTRows, prepare_sft_rows
from trl_miso.data.tokenization import RowTokenizer
from trl_miso.data.tokenizers import check_tokenizer, rendering_no_nulls, without_added_eos
from trl_miso.data.turns import count_own_settings, describe_train_turns, each_completion
from trl_miso.segments import decode

logger = get_logger(__name__)

FIRST_ROWS = 100  # rows whose contexts are made before a model is loaded

# TRL's own preparation: rows of `SFTRows`, the tokenizer, the dataset's name, whether only completions are labelled -> tokenized rows.
SFTPreparation = Callable[[AnyDataset, PreTrainedTokenizerBase, str, bool], AnyDataset]


class PreparedDataset(NamedTuple):
    """Prepared rows, the mode they are prepared in, and the dropped rows (None if the rows were prepared before)."""

    rows: AnyDataset
    mode: str
    dropped: Dropped | None


@dataclass(frozen=True)
class Pipeline:
    """Prepares datasets of any row format in any mode.

    Rows of modes para and succ, and evaluation rows of standard inference, are prepared here. Rows of modes single and
    augment, and rows without a separate output, are prepared by TRL, so that plain SFT is TRL's token for token.

    Args:
        options: The settings that decide what a row becomes.
        tokenizer: With its final special tokens and chat template.
        prepare_as_sft: TRL's own preparation.
        chat_template: Used instead of the tokenizer's own.
        vocab_size: The model's, to check token ids; None skips the check.
        shares_prefixes: Whether bins are planned for common prefixes that are computed once.
        shuffle_seed: Shuffles rows if it is not None.
        num_proc: Processes per `map`.

        The others are settings of `MISOSFTConfig` that change no prepared row by themselves.
    """

    options: DataOptions
    tokenizer: PreTrainedTokenizerBase | None
    prepare_as_sft: SFTPreparation | None
    chat_template: str | None = None
    vocab_size: int | None = None
    shares_prefixes: bool = True
    shuffle_seed: int | None = None
    num_proc: int | None = None
    dataset_text_field: str = "text"
    completion_only_loss: bool | None = None
    context_weighting: str = "uniform"
    eval_contexts: str = "standard"
    share_prefixes: bool = True
    log_shares: bool = True

    @classmethod
    def of(
        cls,
        config: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prepare_as_sft: SFTPreparation | None = None,
        **fields: Any,
    ) -> "Pipeline":
        """The pipeline of a `MISOSFTConfig`; `fields` are further fields. `check` needs the config alone."""
        return cls(
            options=DataOptions.of(config),
            tokenizer=tokenizer,
            prepare_as_sft=prepare_as_sft,
            shuffle_seed=config.seed if config.shuffle_dataset else None,
            num_proc=config.dataset_num_proc,
            dataset_text_field=config.dataset_text_field,
            completion_only_loss=config.completion_only_loss,
            context_weighting=config.context_weighting,
            eval_contexts=config.eval_contexts,
            share_prefixes=config.share_prefixes,
            log_shares=config.log_shares,
            **fields,
        )

    def __call__(
        self,
        dataset: AnyDataset,
        name: str,
        training_mode: str | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        packing: bool = False,
    ) -> PreparedDataset:
        """Prepare a dataset, and log what became of its rows.

        Args:
            name: What to call the dataset in logs and errors, e.g. `"train"`.
            training_mode: The mode of the training rows if these are evaluation rows; None for training rows.
            formatting_func: Makes the plain text of a row, as in TRL.
            packing: Whether to pack the rows into bins.

        Raises:
            ValueError: If settings or rows would be trained on wrongly.
        """
        check_packing(packing, self.options.max_length)
        dataset, columns = _readable(dataset, name, self.dataset_text_field)
        if formatting_func is not None:
            columns = [self.dataset_text_field]
        if "miso_layout" in columns:
            self._check_prepared(dataset, name)
            return PreparedDataset(self.pack(dataset) if packing else dataset, training_mode or "para", None)
        kind = row_format(columns, self.dataset_text_field)
        is_chat = _is_chat(dataset, kind)
        report_unread(columns, kind, self.dataset_text_field, name)
        if training_mode is not None and self.eval_contexts == "standard":
            mode = "single"
            by_trl = kind in ("text", "tokenized") or training_mode in ("single", "augment")
        else:
            mode = self._mode(columns, kind, is_chat, is_trained_on=training_mode is None)
            by_trl = mode in ("single", "augment")
        if STATUS in columns:
            report_statuses(count_statuses(dataset), name, isinstance(dataset, IterableDataset))
        if kind == "constraints" and mode in ("para", "augment"):
            report_held(dataset, self.options, self.num_proc, name)
        raw_rows = dataset
        if not by_trl and is_chat is not False:
            own: Iterable[Any] = ()
            if "train_turns" in columns and isinstance(dataset, Dataset):
                own = dataset["train_turns"][:]
            meaning = describe_train_turns(
                self.options.train_turns, is_conversation(kind, columns), count_own_settings(own)
            )
            logger.info(f"{name} dataset: train_turns={meaning}.")
        if by_trl:
            dataset, dropped = self._prepare_as_sft(dataset, kind, is_chat, mode, formatting_func, name)
        else:
            dataset, dropped = self._prepare_contexts(dataset, kind, is_chat, mode, name)
        report_mixture(dataset, name, mode)
        if mode == "para":
            warn_unless_mixed(dataset, raw_rows, kind, self.options, name)
        if packing:
            dataset = self.pack(dataset)
        return PreparedDataset(self._shuffled(dataset), mode, dropped)

    def check(self, dataset: AnyDataset, formatting_func: Callable[[dict], str] | None = None) -> None:
        """Refuse training rows that columns, settings, the tokenizer's class and the first rows show to be wrong: quick.

        Raises:
            ValueError: As `__call__`.
        """
        dataset, columns = _readable(dataset, "train", self.dataset_text_field)
        if formatting_func is not None or "miso_layout" in columns:
            return
        kind = row_format(columns, self.dataset_text_field)
        if self.tokenizer is not None and kind != "tokenized":
            check_tokenizer(self.tokenizer)
        mode = self._mode(columns, kind, _is_chat(dataset, kind), is_trained_on=True)
        if kind in ("text", "tokenized"):
            return
        make = parallel_row if mode in ("para", "augment") else full_row
        for index, row in enumerate(islice(dataset, FIRST_ROWS)):
            with naming(index), suppress(RowDropped):
                for one in each_completion(row, kind):
                    make(one, kind, self.options)

    def _mode(self, columns: list[str], kind: str, is_chat: bool | None, is_trained_on: bool) -> str:
        """The mode of rows that are prepared as for training. Raises ValueError for settings without an effect on them."""
        mode = resolve_mode(self.options.context_mode, kind)
        if "context_weights" in columns:
            check_weights(self._changed, mode, kind)
        if is_trained_on:
            check_effects(self._changed, mode, kind, is_chat)
        return mode

    @property
    def _changed(self) -> list[str]:
        """The settings that are not at their defaults, in the order of their fields."""
        changed: list[str] = []
        for part in (self.options, self):
            changed += [field.name for field in fields(part) if getattr(part, field.name) != field.default]
        return changed

    def pack(self, dataset: AnyDataset) -> AnyDataset:
        """Pack prepared rows into bins of at most `max_length` tokens; see `bins.pack_rows`."""
        assert self.options.max_length is not None
        # Bins are planned over neighbouring rows, so rows are shuffled first.
        return pack_rows(self._shuffled(dataset), self.options.max_length, self.shares_prefixes, self.num_proc)

    def _shuffled(self, dataset: AnyDataset) -> AnyDataset:
        return dataset if self.shuffle_seed is None else dataset.shuffle(seed=self.shuffle_seed)

    def _prepare_contexts(
        self, dataset: AnyDataset, kind: str, is_chat: bool | None, mode: str, name: str
    ) -> tuple[AnyDataset, Dropped]:
        if self.completion_only_loss is False:
            raise ValueError(
                f"Got completion_only_loss=False with context_mode={self.options.context_mode!r}, expected None or True: with several contexts "
                "only their common output has a loss. Fix: leave it unset, or set context_mode='single'."
            )
        rows = RowPreparation(kind, mode, self.options, self._row_tokenizer(kind, is_chat), self.vocab_size)
        return prepare_rows(dataset, rows, name, self.num_proc)

    def _prepare_as_sft(
        self,
        dataset: AnyDataset,
        kind: str,
        is_chat: bool | None,
        mode: str,
        formatting_func: Callable[[dict], str] | None,
        name: str,
    ) -> tuple[AnyDataset, Dropped]:
        """Convert rows for TRL, let TRL tokenize and label them, then cut them to `max_length`."""
        tokenizer = self._row_tokenizer(kind, is_chat)
        rows = SFTRows(
            kind=kind,
            options=self.options,
            augment=mode == "augment",
            tokenizer=tokenizer,
            padding=_padding_token(self.tokenizer),
            text_field=self.dataset_text_field,
            formatting_func=formatting_func,
        )
        assert self.prepare_as_sft is not None
        has_completion = kind not in ("messages", "text", "tokenized")
        completions_only = has_completion and self.completion_only_loss is None
        dataset, dropped = prepare_sft_rows(dataset, rows, name, self.num_proc)
        dataset = self.prepare_as_sft(dataset, rendering_no_nulls(tokenizer.tokenizer), name, completions_only)
        end_ids = set() if kind == "tokenized" else tokenizer.end_ids()
        dataset, cut = fit_rows(dataset, self.options, name, self.num_proc, self.vocab_size, end_ids)
        return dataset, dropped | cut

    def _row_tokenizer(self, kind: str, is_chat: bool | None) -> RowTokenizer:
        tokenizer = self.tokenizer
        if kind != "tokenized":
            check_tokenizer(tokenizer)
            tokenizer = without_added_eos(tokenizer)
        return RowTokenizer(
            tokenizer,
            self.chat_template,
            self.options.response_template,
            self.options.assistant_only_loss,
            is_chat,
        )

    def _check_prepared(self, dataset: AnyDataset, name: str) -> None:
        """Raise ValueError if rows prepared before have an example over `max_length`: they are not cut again."""
        max_length = self.options.max_length
        if max_length is None or not isinstance(dataset, Dataset):
            return
        for index, row in enumerate(dataset.select_columns("miso_layout")):
            longest = max(example.num_positions for example in decode(row["miso_layout"]))
            if longest > max_length:
                raise ValueError(
                    f"Got a prepared {name} dataset whose row {index} has an example of {longest} positions, expected at most "
                    f"max_length={max_length}. Fix: prepare it again from its text, or set max_length={longest}."
                )


def _readable(dataset: AnyDataset, name: str, text_field: str) -> tuple[AnyDataset, list[str]]:
    """A checked dataset whose rows are Python values, all with the same columns, and these columns."""
    check_dataset(dataset, name)
    dataset = dataset.with_format(None) if isinstance(dataset, Dataset) else same_columns(dataset, text_field)
    return dataset, get_dataset_column_names(dataset)


def _padding_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the pad token; None if it also begins or ends a text."""
    others = (tokenizer.eos_token_id, tokenizer.bos_token_id)
    return None if tokenizer.pad_token_id in others else tokenizer.pad_token_id


def check_dataset(dataset: AnyDataset, name: str) -> None:
    """Refuse a dataset without rows, or with a transform."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            "Got a dataset with a transform (Dataset.with_transform), which preparation would bake in or read past. Expected stored "
            "columns. Fix: apply the transform with Dataset.map before training."
        )
    first_row(dataset, name)


def check_packing(packing: bool, max_length: int | None) -> None:
    """Refuse to pack into bins without a length."""
    if packing and max_length is None:
        raise ValueError("Got packing=True with max_length=None, expected a length to pack to. Fix: set max_length.")


def check_first_row(dataset: AnyDataset | None, assistant_only_loss: bool) -> None:
    """Refuse a first row from which TRL cannot tell whether rows are conversations."""
    if dataset is None:
        return
    row = first_row(dataset.with_format(None) if isinstance(dataset, Dataset) else dataset, "train")
    for name in ("messages", "prompt", "completion"):
        is_empty = name in row and (row[name] is None or (isinstance(row[name], list) and not row[name]))
        if is_empty and assistant_only_loss:
            raise ValueError(
                f"Row 0: Got {row[name]} in column {name!r} with assistant_only_loss=True, expected messages: the first row "
                "shows whether rows have turns. Fix: leave the row out."
            )


def first_row(dataset: AnyDataset, name: str) -> Any:
    """The first row. Raises ValueError if there is none."""
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(
            f"Got no rows in the {name} dataset, expected at least one. Fix: check the file, the split or the filter."
        )
    return row


def _is_chat(dataset: AnyDataset, kind: str) -> bool | None:
    """Whether rows are messages, by the first row with a completion; None if no row decides it."""
    if is_conversation(kind, get_dataset_column_names(dataset)):
        return True
    if kind in ("text", "tokenized"):
        return False
    for row in islice(dataset, SAMPLE):
        several = row.get("completions")
        for completion in (row.get("completion"), *(several if isinstance(several, list) else [])):
            if isinstance(completion, str | list) and completion:
                return isinstance(completion, list)
    return None
