"""The contract between data and attention: segments, contexts and how a batch of them is packed."""

from trl_miso.segments.packed import WEIGHTINGS, PackedSegments, Varlen, pack
from trl_miso.segments.tree import (
    ROOT,
    Branch,
    Example,
    Segment,
    bits_float,
    common_prefix,
    decode,
    encode,
    float_bits,
    parallel,
    single,
    successive,
    unshare,
)

__all__ = [
    "ROOT",
    "WEIGHTINGS",
    "Branch",
    "Example",
    "PackedSegments",
    "Segment",
    "Varlen",
    "bits_float",
    "common_prefix",
    "decode",
    "encode",
    "float_bits",
    "pack",
    "parallel",
    "single",
    "successive",
    "unshare",
]
