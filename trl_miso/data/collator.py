"""Prepared rows to one flat batch with segment metadata, padding-free."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_miso.segments import Example, decode, single, unshare
from trl_miso.segments.packed import pack

ROWS = "miso_rows"  # the batch's raw rows, which the trainer takes out again


@dataclass
class MISODataCollator:
    """Flattens rows of one or more examples each into a batch of one row.

    Every row has `input_ids`, `labels` and `miso_layout` (see `segments.encode`); a row without a layout is one causal
    run. The batch has `input_ids`, `labels`, `position_ids` of shape (1, T) and the integer fields of
    `packing.PackedSegments` under the prefix `miso_`. It is laid out `[contexts | outputs | single runs]`. Where the rows
    say in `miso_row` which raw rows they are of, the batch says so in `miso_rows`, for the trainer's messages.

    Args:
        pad_token_id: Fills up to `pad_to_multiple_of`, as a causal run of its own without labels.
        weighting: `context_weighting` of the config.
        share_prefixes: Compute the common prefixes of contexts once.
        window: The model's smallest sliding window, 0 for none: batches in which it binds get the pairs form's fields.

    Example:
        >>> collator = MISODataCollator(pad_token_id=0)
        >>> batch = collator([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["position_ids"].tolist()
        ([[5, 6, 7, 8, 9]], [[-100, 6, 7, -100, 9]], [[0, 1, 2, 0, 1]])
    """

    pad_token_id: int
    weighting: str = "uniform"
    share_prefixes: bool = True
    window: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        examples, input_ids, labels = self._flatten(rows)
        num_examples = len(examples)
        short = -len(input_ids) % (self.pad_to_multiple_of or 1)
        if short:
            examples.append(single(short))
            input_ids += [self.pad_token_id] * short
            labels += [-100] * short
        order, position_ids, packed = pack(examples, self.weighting, self.window)
        packed.num_examples = num_examples
        batch = {
            "input_ids": torch.tensor(input_ids)[order][None],
            "labels": torch.tensor(labels)[order][None],
            "position_ids": torch.from_numpy(position_ids)[None],
        }
        # A label is predicted from the row before it, which for the first token of a segment is another segment's.
        batch["labels"][0, packed.cu_seqlens_q[:-1].long()] = -100
        if all(row.get("miso_row") for row in rows):
            batch[ROWS] = torch.tensor([number for row in rows for number in row["miso_row"]])
        return batch | packed.to_batch()

    def _flatten(self, rows: Sequence[dict[str, Any]]) -> tuple[list[Example], list[int], list[int]]:
        examples: list[Example] = []
        input_ids: list[int] = []
        labels: list[int] = []
        for row in rows:
            at = 0
            ids = list(row["input_ids"])
            row_labels = list(row.get("labels", ids))
            layout = row.get("miso_layout")
            for example in decode(layout) if layout else [single(len(ids))]:
                span = slice(at, at := at + example.num_tokens)
                parts = [ids[span], row_labels[span]]
                if not self.share_prefixes:
                    example, parts = unshare(example, parts)
                examples.append(example)
                input_ids += parts[0]
                labels += parts[1]
            if not ids or at != len(ids) or len(row_labels) != len(ids):
                raise ValueError(
                    f"Got a row of {len(ids)} tokens and {len(row_labels)} labels whose layout has {at} tokens, expected equal "
                    "numbers above 0. Fix: prepare the dataset again, or drop its miso_layout column and its empty rows."
                )
        return examples, input_ids, labels
