import json

import pytest

from hf_slim import DistillationConfig, PruningConfig, QuantizationConfig, SlimError

CONFIGS = [
    QuantizationConfig(scheme="w4a16", group_size=32, embeddings="w8a16", ignore=("*.lm_head",)),
    PruningConfig(sparsity={"kv_heads": 0.25}, uniform=False, criterion="l1", schedule="linear"),
    PruningConfig(target={"latency": 0.5}, spend_on=["ffn"], schedule="staged", rounds=3),
    DistillationConfig(teacher="some/model", alpha=0.3, temperature=4.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_config_survives_json(config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("config_class", "values", "says"),
    [
        (PruningConfig, {"sparsity": 50}, "share, not a percentage.*0.5"),
        (PruningConfig, {"sparsity": {"ffn": 1.0}}, r"\[0, 1\)"),
        (PruningConfig, {"sparsity": {"fnn": 0.5}}, "'ffn'"),
        (PruningConfig, {"sparsity": 0}, "nothing would be removed"),
        (PruningConfig, {"criterion": "taylr"}, "'taylor'"),
        (PruningConfig, {"schedule": "cubik"}, "'cubic'"),
        (PruningConfig, {"start": 0.9, "stop": 0.5}, "behind"),
        (PruningConfig, {"uniform": {"ffn": "yes"}}, "true or false"),
        (QuantizationConfig, {"scheme": "w8a9"}, "'w8a8'"),
        (QuantizationConfig, {"embeddings": "int8"}, "Allowed"),
        (QuantizationConfig, {"group_size": -1}, "positive whole number"),
        (QuantizationConfig, {"ignore": "lm_head"}, "list of patterns"),
        (QuantizationConfig, {"schem": "w8a8"}, "'scheme'"),
        (DistillationConfig, {"temperature": 0}, "positive"),
        (DistillationConfig, {"alpha": 0}, "would run and not count"),
        (DistillationConfig, {"alpha": 2}, r"\[0, 1\]"),
        (DistillationConfig, {"teacher": ""}, "'self'"),
    ],
)
def test_a_wrong_value_says_what_is_allowed(config_class, values, says):
    with pytest.raises(SlimError, match=says):
        config_class.from_dict(values)
