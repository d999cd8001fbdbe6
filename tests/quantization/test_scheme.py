import pytest

from hf_slim import Grid, QuantizationConfig, Scheme, SlimError
from hf_slim.quantization.scheme import SCHEMES

NAMES = [
    *SCHEMES,
    "w4a16-g64",
    "w3a16-g32-asym",
    "w8a8-tensor-static",
    "w5a16-g16",
    "nf4-g32",
    "codebook3-g64",
    "w8a8-floor",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_reads_back_what_it_says(name):
    scheme = Scheme.parse(name)
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.of(scheme.to_json()) == scheme


def test_a_scheme_without_a_name_is_kept_in_full():
    scheme = Scheme(Grid(granularity="tensor", symmetric=False, signed=False, scale=0.5, zero_point=3.0))
    assert isinstance(scheme.to_json(), dict)
    assert Scheme.of(scheme.to_json()) == scheme
    config = QuantizationConfig(scheme=scheme, overrides={"*.a": Scheme.parse("nf4")})
    assert QuantizationConfig.from_dict(config.to_dict()) == config
    assert config.linear_scheme() == scheme
    assert config.overrides == {"*.a": "nf4"}


def test_bits_count_codes_and_scales():
    assert Scheme.parse("w4a16-g64").weights.bits_per_value(576) == 4.25
    assert Scheme.parse("nf4").weights.bits_per_value(576) == 4.5
    assert Scheme.parse("w1.58a8").weights.bits_per_value(576) == 1.6


@pytest.mark.parametrize("text", ["w9a8", "w4a4x", "int4", "w4a16-g", "w4a16-fast", "w4a16-static", "", "W4A16"])
def test_a_name_that_means_nothing_is_refused(text):
    with pytest.raises(SlimError):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"scheme": "w4a61"}, "Unknown quantization scheme 'w4a61'"),
        ({"learn": "lsk"}, "Unknown `learn` 'lsk'. Did you mean 'lsq'"),
        ({"observer": "max"}, "Unknown observer"),
        ({"initialize": "gtpq"}, "Did you mean 'gptq'"),
        ({"overrides": ["w4a16"]}, "must map patterns to schemes"),
        ({"start": 1.0}, "must be in"),
        ({"kv_cache": "int2"}, "Unknown `kv_cache`"),
        (
            {"scheme": {"weights": {"bits": 4}, "activations": {"bits": 8, "granularity": "channel"}}},
            "'token' or 'tensor'",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_refused(settings, says):
    with pytest.raises(SlimError, match=says):
        QuantizationConfig(**settings)
