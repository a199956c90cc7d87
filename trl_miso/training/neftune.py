"""NEFTune's noise on the embeddings of packed rows (https://arxiv.org/abs/2310.05914)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trl_miso.segments.packed import PackedSegments


@contextmanager
def noisy_embeddings(embeddings: nn.Module, alpha: float, packed: PackedSegments, num_tokens: int) -> Iterator[None]:
    """Within the block, add uniform noise within ± alpha / sqrt(row length x dimension) to the embeddings of a batch (1, T, dimension).

    transformers' own hook takes the length of the packed batch for that of a row, so its noise falls with the rows of a batch.
    """
    lengths = row_lengths(packed, num_tokens)

    def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        bound = alpha / torch.sqrt(lengths * output.shape[-1])
        return output + torch.zeros_like(output).uniform_(-1, 1) * bound[:, None].to(output.dtype)

    hook = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def row_lengths(packed: PackedSegments, num_tokens: int) -> torch.Tensor:
    """Tokens of the row in which each packed token stands, (T,), int64: of a context with its output, or of a single run.

    A token of several rows, as the output of several contexts is, gets the length of the longest.
    """
    lengths = torch.zeros(num_tokens, dtype=torch.long, device=packed.cu_seqlens_q.device)
    rows = torch.arange(num_tokens, device=lengths.device)

    # Each segment reads its path: every row of the path is in a row of at least that length.
    path = packed.cu_seqlens_k.diff().long()
    read = rows if packed.kv_index is None else packed.kv_index
    lengths.scatter_reduce_(0, read, path.repeat_interleave(path, output_size=len(read)), "amax")
    if not packed.num_mixed:
        return lengths

    # Each branch is a row: a context, which the branch reads, and the output.
    call = packed.cross_call
    output, context = call.cu_seqlens_q.diff().long(), call.cu_seqlens_k.diff().long()
    read = rows[: packed.output_start] if call.kv_index is None else call.kv_index
    whole = (output + context).repeat_interleave(context, output_size=len(read))
    lengths.scatter_reduce_(0, read, whole, "amax")
    written = packed.output_start + packed.branch_rows
    whole = (output + context).repeat_interleave(output, output_size=len(written))
    return lengths.scatter_reduce_(0, written, whole, "amax")
