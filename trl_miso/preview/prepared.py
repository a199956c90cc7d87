"""Rows as `MISOSFTTrainer` prepares them, as plain data for the renderings."""

import json
import tempfile
from collections.abc import Iterator
from copy import copy
from typing import Any

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trl_miso.config import MISOSFTConfig
from trl_miso.preview.statistics import Baseline, ModelShape, statistics_of
from trl_miso.report import STATUS, count_statuses
from trl_miso.segments import decode
from trl_miso.trainer import MISOSFTTrainer

_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}


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
        dataset: Rows in any format of `trl_miso.contexts`.
        shape: Of the model, to estimate the cost of its compute.
        name: What to call the data set.
        rows: How many to show. The first row dropped for each reason, and the first cut, are shown besides.
        complete: Whether `dataset` is the whole data set.

    Returns:
        `{"statistics": ..., "rows": [...]}`, values that JSON can hold. A row has its `ids`, `texts` and `labels` in packed
        order, its `segments` and `contexts` (the branches of `trl_miso.segments`), and the texts that were `cut`; or the
        reason it was `dropped`.

    Raises:
        ValueError: As `MISOSFTTrainer`, for settings or rows that cannot be trained on; for rows prepared before.
    """
    if "miso_layout" in dataset.column_names:
        raise ValueError(
            f"Got {name}, which is prepared already and no longer says what its rows were, expected raw rows. Fix: preview the "
            "data set it was prepared from."
        )
    trainer = _stand_in(dataset, tokenizer, args)
    # The tokenizer now has its chat template; to set it again would add a cloned template's tokens twice.
    changes = {"context_mode": "single", "chat_template_path": None}
    sft = trainer if trainer.training_mode == "single" else _stand_in(dataset, tokenizer, args, **changes)
    statistics = statistics_of(
        trainer.train_dataset,
        mode=trainer.training_mode or "",
        baseline=Baseline.of(sft.train_dataset),
        shape=shape,
        bin_size=args.max_length if args.packing else None,
        shared=trainer.data_collator.share_prefixes,
    )
    dropped = trainer.dropped_rows.get("train", {})
    statistics |= {
        "dataset": name,
        "model": shape.name,
        "rows": len(dataset),
        "complete": complete,
        "statuses": dict(count_statuses(dataset)) if STATUS in dataset.column_names else {},
        "dropped": {why: {"rows": len(which), "first_row": which[0]} for why, which in dropped.items()},
    }
    return {"statistics": statistics, "rows": list(_rows(dataset, trainer, tokenizer, args, rows))}


def _stand_in(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig, **changes: Any
) -> MISOSFTTrainer:
    """A trainer that prepares rows as the user's would, around a model too small to matter."""
    args = copy(args)
    quiet = {
        "report_to": [],
        "push_to_hub": False,
        "eval_strategy": "no",
        "do_eval": False,
        "load_best_model_at_end": False,
    }
    whole = {"packing": False, "shuffle_dataset": False}
    bare = {"model_init_kwargs": None, "use_liger_kernel": False, "attention_kernel": "auto", "torch_compile": False}
    for key, value in (quiet | whole | bare | changes).items():
        setattr(args, key, value)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1
    )
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        return MISOSFTTrainer(LlamaForCausalLM(config), args, train_dataset=dataset, processing_class=tokenizer)


def _rows(
    dataset: Dataset, trainer: MISOSFTTrainer, tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig, count: int
) -> Iterator[dict[str, Any]]:
    """The first rows, then one dropped for each reason, then the first that was cut."""
    prepared: Dataset = trainer.train_dataset
    why = {row: reason for reason, which in trainer.dropped_rows.get("train", {}).items() for row in which}
    numbers = [number for batch in prepared.select_columns("miso_row").iter(1000) for (number,) in batch["miso_row"]]
    cuts = [cut for batch in prepared.select_columns("miso_cut").iter(1000) for (cut,) in batch["miso_cut"]]
    shown = list(range(min(count, len(dataset))))
    if count:
        shown += [which[0] for which in trainer.dropped_rows.get("train", {}).values()]
        shown += [number for number, cut in zip(numbers, cuts, strict=True) if cut][:1]
    for number in dict.fromkeys(shown):
        raw = dataset[number]
        common: dict[str, Any] = {"index": number, "status": raw.get(STATUS) or "", "dropped": "", "raw": "", "cut": []}
        examples = [i for i, row in enumerate(numbers) if row == number]
        uncut = _uncut(dataset, trainer, tokenizer, args, number) if any(cuts[i] for i in examples) else None
        for place, i in enumerate(examples):
            made = _shown(prepared[i], trainer.training_mode, tokenizer)
            if uncut is not None and cuts[i]:
                made["cut"] = _texts(uncut[place]["input_ids"][-cuts[i] :], tokenizer)
            yield common | made
        if number in why and not examples:
            mode = {"mode": trainer.training_mode or "", "dropped": why[number], "raw": _excerpt(raw)}
            empty: dict[str, list] = {key: [] for key in ("ids", "texts", "labels", "segments", "contexts")}
            yield common | mode | empty


def _uncut(
    dataset: Dataset, trainer: MISOSFTTrainer, tokenizer: PreTrainedTokenizerBase, args: MISOSFTConfig, number: int
) -> Dataset | None:
    """The row as it is before its end is cut off."""
    if args.truncation_mode != "keep_start":
        return None
    changes = {"context_mode": trainer.training_mode, "max_length": None, "chat_template_path": None}
    return _stand_in(dataset.select([number]), tokenizer, args, **changes).train_dataset


def _shown(row: dict[str, Any], mode: str | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # A row that TRL packed before holds several runs: shown as the first of them.
    example = next(decode(row["miso_layout"]))
    ids, labels = row["input_ids"][: example.num_tokens], row["labels"][: example.num_tokens]
    return {
        "mode": (mode or "") if example.branches or mode == "augment" else "single",
        "ids": ids,
        "texts": _texts(ids, tokenizer),
        "labels": labels,
        "segments": [segment._asdict() for segment in example.segments],
        "contexts": [branch._asdict() for branch in example.branches],
    }


def _texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token says by itself: spaces kept, parts of a character as bytes."""
    texts = {}
    for i in set(ids):
        token = tokenizer.convert_ids_to_tokens(i) or ""
        text = token.replace("\u2581", " ") if "\u2581" in token else tokenizer.decode([i])
        if "\ufffd" in text and all(char in _BYTES for char in token):
            text = "".join(f"<0x{_BYTES[char]:02X}>" for char in token)
        texts[i] = text
    return [texts[i] for i in ids]


def _excerpt(row: dict[str, Any], length: int = 600) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= length else f"{text[:length]} ... ({len(text):,} characters)"
