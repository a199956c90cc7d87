"""MISOSFTConfig: values that are refused, and help texts that agree with the docstring."""

import re

import pytest
import torch

from trl_miso import MISOSFTConfig


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"context_mode": "parallel"}, "context_mode"),
        ({"context_weighting": "mean"}, "context_weighting"),
        ({"output_positions": "first"}, "output_positions"),
        ({"attention_kernel": "triton"}, "attention_kernel"),
        ({"eval_contexts": "all"}, "eval_contexts"),
        ({"para_prob": 1.5}, "para_prob"),
        ({"chunk_probs": [0.5, 0.2]}, "chunk_probs"),
        ({"chunk_probs": []}, "chunk_probs"),
        ({"full_context_weight": 1.0}, "full_context_weight"),
        ({"full_context_weight": 0.5, "context_weighting": "fid"}, "full_context_weight"),
        ({"full_context_weight": 0.5, "include_full": False}, "full_context_weight"),
        ({"truncation_mode": "keep_end"}, "truncation_mode"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "packing_strategy"),
    ],
)
def test_wrong_values(make_config, options, match):
    with pytest.raises(ValueError, match=f"(?s)Got {match}=.*expected.*Fix: correct {match}"):
        make_config(**options)


def test_help_and_docstring_agree():
    text = " ".join(MISOSFTConfig.__doc__.split())
    for name in MISOSFTConfig.__annotations__:
        field = MISOSFTConfig.__dataclass_fields__[name]
        plain = lambda s: re.sub(r"[^a-z0-9]", "", s.lower())  # noqa: E731
        assert f"{name} (`" in text, f"{name} is not in the docstring"
        body = text.split(f"{name} (`", 1)[1].split("): ", 1)[1]
        assert plain(body).startswith(plain(field.metadata["help"])), f"help and docstring of {name} differ"


def test_compute_dtype(make_config):
    """Mixed precision decides; without it the weights do."""
    assert make_config().compute_dtype(torch.float16) == torch.float16
    assert make_config(bf16=True).compute_dtype(torch.float32) == torch.bfloat16
    config = make_config()
    config.fp16 = True  # which transformers refuses on a CPU
    assert config.compute_dtype(torch.float32) == torch.float16
