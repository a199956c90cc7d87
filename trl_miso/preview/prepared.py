"""Rows as `MISOSFTTrainer` prepares them, as plain data for the renderings."""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, TrainingArguments

from trl_miso.config import MISOSFTConfig
from trl_miso.data.dropped import STATUS, count_statuses
from trl_miso.data.token_text import token_texts
from trl_miso.preview.statistics import Baseline, ModelShape, statistics_of
from trl_miso.segments import decode
from trl_miso.training.trainer import MISOSFTTrainer

# What TRL and MISO add to transformers' arguments is about rows, but for what is about the model.
_MODEL = ("activation_offloading", "attention_kernel", "loss_type", "model_init_kwargs", "router_aux_loss_coef")
_ROWS = set(MISOSFTConfig.__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__) - set(_MODEL)


def preview_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: MISOSFTConfig,
    shape: ModelShape,
    *,
    name: str = "train",
    rows: int = 5,
    complete: bool = True,
) -> dict[str, Any]:
    """Prepare a data set as training would and say what became of it.

    Args:
        dataset: Rows in any format of `trl_miso.data.contexts`.
        shape: Of the model, to estimate the cost of its compute.
        name: What to call the data set.
        rows: How many to show. The first row dropped for each reason, and the first cut, are shown besides.
        complete: Whether `dataset` is the whole data set.

    Returns:
        `{"statistics": ..., "rows": [...]}`, values that JSON can hold. A row has its `ids`, `texts` and `labels` in packed
        order, its `segments` and `contexts` (the branches of `trl_miso.segments`), and the texts that were `cut`; or the
        reason it was `dropped`.

    Raises:
        ValueError: As `MISOSFTTrainer`, for settings or rows that cannot be trained on; for a stream; for rows prepared
            before.
    """
    _check(dataset, args, name)
    tokenizer = deepcopy(tokenizer)  # training gives it a chat template, a pad token, ...
    with _state_of_its_own():
        return _preview(dataset, tokenizer, args, shape, name, rows, complete)


def _check(dataset: Dataset, args: MISOSFTConfig, name: str) -> None:
    """Refuse what has no rows to show, or none to prepare."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"Got {name} as {type(dataset).__name__}, expected a Dataset, whose rows can be counted. Fix: preview the first rows of "
            "a stream, Dataset.from_list(list(stream.take(1000)))."
        )
    if not len(dataset):
        raise ValueError(f"Got no rows in {name}, expected at least one. Fix: check the file or the split.")
    if "miso_layout" in dataset.column_names or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        raise ValueError(
            f"Got {name}, which is prepared already and no longer says what its rows were, expected raw rows. Fix: preview the "
            "data set it was prepared from, without skip_prepare_dataset."
        )
    if args.packing and args.max_length is None:
        raise ValueError("Got packing=True with max_length=None, expected a length to pack to. Fix: set max_length.")


@contextmanager
def _state_of_its_own() -> Iterator[None]:
    """Keep what accelerate knows of the process, device and plugins as it was: the first trainer to be made decides it."""
    states = [(state._shared_state, dict(state._shared_state)) for state in (AcceleratorState, PartialState)]
    try:
        yield
    finally:
        for state, before in states:
            state.clear()
            state.update(before)


def _preview(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: MISOSFTConfig,
    shape: ModelShape,
    name: str,
    rows: int,
    complete: bool,
) -> dict[str, Any]:
    trainer = _stand_in(dataset, tokenizer, args)
    if trainer.training_mode == "single":
        baseline = Baseline.of(trainer.train_dataset)
    else:
        # Uncut, since plain SFT may not be able to train on any of the rows: the full context is the longest.
        sft = _again(dataset, tokenizer, args, context_mode="single")
        baseline = Baseline.of(sft.train_dataset, args.max_length)
    statistics = statistics_of(
        trainer.train_dataset,
        mode=trainer.training_mode or "",
        baseline=baseline,
        shape=shape,
        shared=trainer.data_collator.share_prefixes,
    )
    if args.packing:
        layouts = trainer.train_dataset.select_columns("miso_layout")
        for column in ("input_ids", "labels"):  # which need not be copied to be counted
            layouts = layouts.add_column(column, [[]] * len(layouts))
        bins, tokens = len(trainer._pack(layouts, args)), statistics["tokens"]["unique"]
        statistics["bins"] = {
            "max_length": args.max_length,
            "bins": bins,
            "filled": tokens / (bins * args.max_length),
            "examples_per_bin": round(statistics["examples"] / bins, 1),
        }
    dropped = trainer.dropped_rows.get("train", {})
    statistics |= {
        "dataset": name,
        "model": shape.name,
        "rows": len(dataset),
        "complete": complete,
        "statuses": dict(count_statuses(dataset)) if STATUS in dataset.column_names else {},
        "dropped": {why: {"rows": len(set(which)), "first_row": which[0]} for why, which in dropped.items()},
    }
    return {"statistics": statistics, "rows": list(_rows(dataset, trainer, tokenizer, args, rows))}


def _stand_in(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig, **changes: Any
) -> MISOSFTTrainer:
    """A trainer that prepares rows as the user's would, around a model too small to matter, on no device that is in use."""
    settings = {field: deepcopy(getattr(args, field)) for field in _ROWS}
    settings |= {field: getattr(args, field) for field in ("seed", "data_seed", "neftune_noise_alpha", "ddp_backend")}
    settings |= {"use_cpu": args.use_cpu or args.world_size == 1, "bf16": False, "gradient_checkpointing": False}
    # Neither packed nor shuffled, so that rows keep their numbers; TRL refuses padding_free where it is not packed.
    settings |= {"packing": False, "padding_free": args.padding_free and not args.packing, "shuffle_dataset": False}
    size = max(len(tokenizer), *(i + 1 for i in tokenizer.get_vocab().values()))  # some vocabularies have gaps
    config = LlamaConfig(
        vocab_size=size, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1
    )
    with tempfile.TemporaryDirectory() as folder:
        own = MISOSFTConfig(folder, report_to=[], **settings | changes)
        return MISOSFTTrainer(LlamaForCausalLM(config), own, train_dataset=dataset, processing_class=tokenizer)


def _again(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig, context_mode: str | None
) -> MISOSFTTrainer:
    """A further stand-in, whose rows are not cut: it logs nothing a second time, and the tokenizer has its template."""
    logger = logging.getLogger("trl_miso")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        changes = {"context_mode": context_mode, "max_length": None, "chat_template_path": None}
        return _stand_in(dataset, tokenizer, args, **changes)
    finally:
        logger.setLevel(level)


def _rows(
    dataset: Dataset, trainer: MISOSFTTrainer, tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig, count: int
) -> Iterator[dict[str, Any]]:
    """The first rows, then one dropped for each reason, then the first that was cut."""
    prepared, dropped = trainer.train_dataset, trainer.dropped_rows.get("train", {})
    numbers = [number for batch in prepared.select_columns("miso_row").iter(1000) for (number,) in batch["miso_row"]]
    cuts = [cut for batch in prepared.select_columns("miso_cut").iter(1000) for (cut,) in batch["miso_cut"]]
    shown = list(range(min(count, len(dataset))))
    if count:
        shown += [which[0] for which in dropped.values()]
        shown += [number for number, cut in zip(numbers, cuts, strict=True) if cut][:1]
    dataset = dataset.with_format(None)
    for number in dict.fromkeys(shown):
        raw = dataset[number]
        common: dict[str, Any] = {"index": number, "status": raw.get(STATUS) or "", "dropped": "", "raw": "", "cut": []}
        examples = [i for i, row in enumerate(numbers) if row == number]
        uncut = _uncut(dataset, trainer, tokenizer, args, number) if any(cuts[i] for i in examples) else None
        for i in examples:
            made = _shown(prepared[i], trainer.training_mode, tokenizer)
            if uncut is not None and cuts[i]:
                (whole,) = [ids for ids in uncut if ids[: len(made["ids"])] == made["ids"]][:1]
                made["cut"] = token_texts(whole[len(made["ids"]) :], tokenizer)
            yield common | made
        # With augment some contexts of a row may be dropped and others not.
        for reason in (reason for reason, which in dropped.items() if number in which):
            mode = {"mode": trainer.training_mode or "", "dropped": reason, "raw": _excerpt(raw)}
            empty: dict[str, list] = {key: [] for key in ("ids", "texts", "labels", "segments", "contexts")}
            yield common | mode | empty


def _uncut(
    dataset: Dataset, trainer: MISOSFTTrainer, tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig, number: int
) -> list[list[int]] | None:
    """The ids of a row's examples as they are before their ends are cut off."""
    if args.truncation_mode != "keep_start":
        return None
    whole = _again(dataset.select([number]), tokenizer, args, context_mode=trainer.training_mode)
    return list(whole.train_dataset["input_ids"])


def _shown(row: dict[str, Any], mode: str | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # A row that TRL packed before holds several runs: shown as the first of them.
    example = next(decode(row["miso_layout"]))
    ids, labels = row["input_ids"][: example.num_tokens], row["labels"][: example.num_tokens]
    return {
        "mode": (mode or "") if example.branches or mode == "augment" else "single",
        "ids": ids,
        "texts": token_texts(ids, tokenizer),
        "labels": labels,
        "segments": [segment._asdict() for segment in example.segments],
        "contexts": [branch._asdict() for branch in example.branches],
    }


def _excerpt(row: dict[str, Any], length: int = 600) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= length else f"{text[:length]} ... ({len(text):,} characters)"
