"""Prepared rows to one flat batch with segment metadata, padding-free."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from trl_miso.data.bins import ROW_LENGTHS
from trl_miso.segments import Example, decode, single, unshare_row
from trl_miso.segments.packed import pack

# Keys that the trainer removes before the forward pass.
ROWS = "miso_rows"  # numbers of the batch's raw rows
PLACES = "miso_places"  # (tokens,) the place in the batch of each token, in the order of the rows
BINS = "miso_bins"  # (bins,) the number of rows of each bin; only in a batch of bins


@dataclass
class MISODataCollator:
    """Flattens rows of one or more examples each into a batch of one row.

    A prepared row has `input_ids`, `labels` and `miso_layout` (see `segments.encode`); a row without a layout is one
    causal run. The batch has `input_ids`, `labels` and `position_ids` of shape (1, T), and the integer fields of
    `segments.packed.PackedSegments` under the prefix `miso_`. Its tokens are laid out `[contexts | outputs | others]`.
    If every row has the number of its raw row in `miso_row`, the batch lists these numbers in `miso_rows`.

    Args:
        pad_token_id: Pads up to `pad_to_multiple_of`, as a causal run of its own without labels.
        weighting: `context_weighting` of the config.
        share_prefixes: Whether to compute the common prefixes of contexts once.
        window: The model's smallest sliding window in tokens, 0 for none. A batch in which the window binds also gets the
            fields of the pairs form.
        pad_to_multiple_of: The batch's number of tokens is padded to a multiple of this.
        keep_rows: Whether to add what it takes to restore the rows: the number of tokens of each (`miso_row_lengths`), the places
            of these tokens (`miso_places`), and the number of rows of each bin (`miso_bins`).

    Raises:
        ValueError: For a row whose layout does not fit its tokens.

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
    keep_rows: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        examples, input_ids, labels, lengths = self._flatten(rows)
        num_examples, num_tokens = len(examples), len(input_ids)
        padding = -len(input_ids) % (self.pad_to_multiple_of or 1)
        if padding:
            examples.append(single(padding))
            input_ids += [self.pad_token_id] * padding
            labels += [-100] * padding
        order, position_ids, packed = pack(examples, self.weighting, self.window)
        packed.num_examples = num_examples
        batch = {
            "input_ids": torch.tensor(input_ids)[order][None],
            "labels": torch.tensor(labels)[order][None],
            "position_ids": torch.from_numpy(position_ids)[None],
        }
        # A token is predicted from the one before it. For the first token of a segment that is another segment's token.
        batch["labels"][0, packed.cu_seqlens_q[:-1].long()] = -100
        if all(row.get("miso_row") for row in rows):
            batch[ROWS] = torch.tensor([number for row in rows for number in row["miso_row"]])
        batch |= packed.to_batch()
        if not self.keep_rows:
            return batch
        places = torch.from_numpy(order).argsort()[:num_tokens]  # without those of the padding
        kept = {ROW_LENGTHS: torch.tensor(lengths), PLACES: places}
        if any(row.get(ROW_LENGTHS) for row in rows):
            kept[BINS] = torch.tensor([len(row.get(ROW_LENGTHS) or [0]) for row in rows])
        return kept | batch  # Trainer counts a batch's rows by its first tensor

    def _flatten(self, rows: Sequence[dict[str, Any]]) -> tuple[list[Example], list[int], list[int], list[int]]:
        """The examples of all rows, with their token ids and labels concatenated; and the number of tokens of each row."""
        examples: list[Example] = []
        input_ids: list[int] = []
        labels: list[int] = []
        lengths: list[int] = []
        for row in rows:
            row_ids = list(row["input_ids"])
            row_labels = list(row.get("labels", row_ids))
            layout = row.get("miso_layout")
            row_examples = decode(layout) if layout else [single(len(row_ids))]
            row_ends = {*accumulate(row.get(ROW_LENGTHS) or [len(row_ids)])}
            start = 0
            for example in row_examples:
                end = start + example.num_tokens
                example_ids, example_labels = row_ids[start:end], row_labels[start:end]
                start = end
                if not self.share_prefixes:
                    example, example_ids, example_labels = unshare_row(example, example_ids, example_labels)
                examples.append(example)
                input_ids += example_ids
                labels += example_labels
                if start in row_ends:
                    lengths.append(len(input_ids) - sum(lengths))
            if not row_ids or start != len(row_ids) or len(row_labels) != len(row_ids):
                raise ValueError(
                    f"Got a row of {len(row_ids)} tokens and {len(row_labels)} labels whose layout has {start} tokens, expected equal "
                    "numbers above 0. Fix: prepare the dataset again, or drop its miso_layout column and its empty rows."
                )
        return examples, input_ids, labels, lengths
