"""Latent attention (DeepSeek, MiniCPM3, ...): values of another size than keys, and a rotation of the end of each key.

`test_models.py` compares the models with one-row-per-context execution.
"""

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.support.models import rotation, shrunk
from trl_miso.attention import register_miso_attention
from trl_miso.attention.reference import reference_attention
from trl_miso.attention.rotation import set_rotation
from trl_miso.attention.support import head_dim
from trl_miso.segments import pack, parallel

# Dimensions of a key that are not rotated, of its rotated end, and of a value, in the ratio of the default config.
PROPORTIONS = {
    "deepseek_v2": (16, 8, 16),
    "deepseek_v3": (16, 8, 16),
    "axk1": (16, 8, 16),
    "minicpm3": (16, 8, 16),
    "youtu": (16, 8, 16),
    "glm4_moe_lite": (24, 8, 32),
}


@pytest.mark.parametrize("name", PROPORTIONS)
def test_heads_have_the_proportions_of_the_default_config(name):
    config, default = shrunk(name), type(shrunk(name))()
    small = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    assert small == PROPORTIONS[name]
    unit = default.qk_rope_head_dim // 8
    assert (default.qk_nope_head_dim, default.qk_rope_head_dim, default.v_head_dim) == tuple(unit * x for x in small)
    assert default.num_attention_heads // default.num_key_value_heads == 1
    assert config.num_attention_heads == config.num_key_value_heads == 4
    assert head_dim(config) == max(small[0] + small[1], small[2])


class _Tail:
    """Rotate the last 8 dimensions of a head of 24."""

    def __call__(self, x, offset, limit, inverse=False):
        turned = rotation(8)(x[..., 16:24], offset, limit, inverse)
        return torch.cat([x[..., :16], turned, x[..., 24:]], dim=-1)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("value_size", [16, 24, 40])
def test_windows_and_grouped_heads(kernel, window, value_size):
    """The registered attention equals the definition in float64, outputs and gradients, with two query heads per key."""
    contexts = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8], [5, 6, 20, 21, 22], [5, 6]]
    tokens, example = parallel(contexts, 4, [0.4, 0.3, 0.2, 0.1], "successive")
    order, _, packed = pack([example], "uniform", window=window or 0)
    generator = torch.Generator().manual_seed(0)
    sizes = [(4, 24), (2, 24), (2, value_size)]
    inputs = [
        torch.randn(len(tokens) + 4, *size, dtype=torch.float64, generator=generator, requires_grad=True)
        for size in sizes
    ]
    expected = reference_attention(*inputs, example, "uniform", 24**-0.5, _Tail(), window=window or 0)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)

    module = nn.Module()
    set_rotation(module, _Tail())
    attention = ALL_ATTENTION_FUNCTIONS[register_miso_attention("sdpa", kernel)]
    heads = (x[order].transpose(0, 1)[None] for x in inputs)
    got, _ = attention(module, *heads, None, sliding_window=window, **packed.to_batch())
    assert got.shape == (1, len(tokens) + 4, 4, value_size)
    torch.testing.assert_close(got[0], expected[order], rtol=0, atol=1e-12)
    got_gradients = torch.autograd.grad((got[0] * weights[order]).sum(), inputs)
    for got_gradient, expected_gradient in zip(got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got_gradient, expected_gradient, rtol=0, atol=1e-12)
