"""The contract between data and attention: segments, contexts and how a batch of them is packed."""

from trl_miso.segments.forest import ROOT, Segment, common_prefix
from trl_miso.segments.packed import WEIGHTINGS, PackedSegments, Varlen, pack
from trl_miso.segments.tree import (
    Answer,
    Branch,
    Example,
    Output,
    Span,
    bits_float,
    decode,
    encode,
    float_bits,
    lay_out,
    parallel,
    single,
    successive,
    trained_spans,
    unshare,
    unshare_row,
)

__all__ = [
    "ROOT",
    "WEIGHTINGS",
    "Answer",
    "Branch",
    "Example",
    "Output",
    "PackedSegments",
    "Segment",
    "Span",
    "Varlen",
    "bits_float",
    "common_prefix",
    "decode",
    "encode",
    "float_bits",
    "lay_out",
    "pack",
    "parallel",
    "single",
    "successive",
    "trained_spans",
    "unshare",
    "unshare_row",
]
