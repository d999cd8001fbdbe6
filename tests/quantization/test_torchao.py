"""Where torchao has the same grid, the values are the same."""

import pytest
import torch

from hf_slim.quantization.fake_quant import fake_quantize_weight
from hf_slim.quantization.scheme import Scheme

qat = pytest.importorskip("torchao.quantization.qat", reason="compares with torchao: pip install 'hf_slim[peers]'")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("scheme", "dtype", "grain"),
    [
        ("w8a16", torch.int8, {"granularity": "per_channel"}),
        ("w4a16", torch.int4, {"granularity": "per_channel"}),
        ("w4a16-g32", torch.int4, {"group_size": 32, "scale_precision": torch.bfloat16}),
        ("w3a16-g64", torch.int3, {"group_size": 64, "scale_precision": torch.bfloat16}),
        ("w2a16-g64", torch.int2, {"group_size": 64, "scale_precision": torch.bfloat16}),
        ("w8a16-g32", torch.int8, {"group_size": 32}),
    ],
)
def test_integer_values_equal_those_of_torchao(scheme, dtype, grain, seed):
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(seed))
    config = qat.IntxFakeQuantizeConfig(dtype, is_symmetric=True, **grain)
    theirs = qat.FakeQuantizerBase.from_config(config)(weight)
    assert torch.equal(fake_quantize_weight(weight, Scheme.parse(scheme).weights), theirs.float())
