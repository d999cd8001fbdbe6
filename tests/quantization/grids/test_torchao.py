"""Where torchao has the same grid, the values are the same."""

import pytest
import torch

from hf_slim.quantization.grids.fake_quant import fake_quantize_weight, observed_weight
from hf_slim.quantization.scheme import Scheme

qat = pytest.importorskip("torchao.quantization.qat", reason="compares with torchao: pip install 'hf_slim[peers]'")

GROUPED = [("w4a16-g32", torch.int4, 32), ("w3a16-g64", torch.int3, 64), ("w2a16-g64", torch.int2, 64)]


def random_weight(seed: int) -> torch.Tensor:
    return torch.randn(48, 128, generator=torch.Generator().manual_seed(seed))


def theirs(dtype: torch.dtype, **grain):
    return qat.FakeQuantizerBase.from_config(qat.IntxFakeQuantizeConfig(dtype, is_symmetric=True, **grain))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("scheme", "dtype", "grain"),
    [
        ("w8a16", torch.int8, {"granularity": "per_channel"}),
        ("w4a16", torch.int4, {"granularity": "per_channel"}),
        ("w8a16-g32", torch.int8, {"group_size": 32}),
    ],
)
def test_integer_values_equal_those_of_torchao(scheme, dtype, grain, seed):
    weight = random_weight(seed)
    assert torch.equal(fake_quantize_weight(weight, Scheme.parse(scheme).weights), theirs(dtype, **grain)(weight))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("scheme", "dtype", "group_size"), GROUPED)
def test_scales_of_small_groups_equal_torchaos_in_bfloat16(scheme, dtype, group_size, seed):
    weight = random_weight(seed)
    quantizer = theirs(dtype, group_size=group_size, scale_precision=torch.bfloat16)
    quantizer(weight)
    assert torch.equal(
        observed_weight(weight, Scheme.parse(scheme).weights).scale.squeeze(-1), quantizer.scale.float()
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("scheme", "dtype", "group_size"), GROUPED)
def test_values_of_small_groups_equal_torchaos(scheme, dtype, group_size, seed):
    # torchao divides by a bfloat16 scale through a reciprocal that is bfloat16 too, which moves values near a tie.
    # Weights whose scales are exact in bfloat16 let it work in float32 with the same scales as ours.
    grid = Scheme.parse(scheme).weights
    groups = random_weight(seed).clamp(-0.9, 0.9).view(48, -1, group_size)
    steps = observed_weight(random_weight(seed + 100).clamp(1, 2), grid).scale  # rounded to bfloat16
    half_range = (2**grid.bits - 1) / 2
    groups = groups * steps * half_range
    groups[..., :1] = steps * half_range
    weight = groups.view(48, 128)
    quantizer = theirs(dtype, group_size=group_size)
    assert torch.equal(fake_quantize_weight(weight, grid), quantizer(weight))
    assert torch.equal(quantizer.scale, steps.squeeze(-1))
