import contextlib
import copy
import json
from dataclasses import fields
from typing import Any, Literal

import pytest

from hf_slim import (
    DistillationConfig,
    PruningConfig,
    QuantizationConfig,
    SlimConfigError,
    recipe,  # noqa: F401  imports every config
)
from hf_slim.core.config import SlimConfig, require_whole, type_problem
from hf_slim.quantization.scheme import Scheme

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
        (QuantizationConfig, {"scheme": {}}, "Scheme needs `weights`"),
        (PruningConfig, {"sparsity": {"ffn": 1.0}}, r"\[0, 1\)"),
        (PruningConfig, {"sparsity": {"fnn": 0.5}}, "'ffn'"),
        (PruningConfig, {"sparsity": 0}, "nothing would be removed"),
        (PruningConfig, {"criterion": "taylr"}, "'taylor'"),
        (PruningConfig, {"schedule": "cubik"}, "'cubic'"),
        (PruningConfig, {"start": 0.9, "stop": 0.5}, "must not be after"),
        (PruningConfig, {"uniform": {"ffn": "yes"}}, "true or false"),
        (QuantizationConfig, {"scheme": "w8a9"}, "'w8a8'"),
        (QuantizationConfig, {"embeddings": "int8"}, "Allowed"),
        (QuantizationConfig, {"group_size": -1}, "`group_size` must be a whole number of at least 1"),
        (QuantizationConfig, {"ignore": "lm_head"}, "list of patterns"),
        (QuantizationConfig, {"schem": "w8a8"}, "'scheme'"),
        (DistillationConfig, {"temperature": 0}, "positive"),
        (DistillationConfig, {"alpha": 0}, "the teacher would have no effect"),
        (DistillationConfig, {"alpha": 2}, r"\[0, 1\]"),
        (DistillationConfig, {"teacher": ""}, "'self'"),
    ],
)
def test_a_wrong_value_says_what_is_allowed(config_class, values, says):
    with pytest.raises(SlimConfigError, match=says):
        config_class.from_dict(values)


@pytest.mark.parametrize(
    ("config_class", "wrong", "right"),
    [
        (PruningConfig, {"sparsty": 0.5}, "'sparsity'"),
        (QuantizationConfig, {"schem": "w8a8"}, "'scheme'"),
        (DistillationConfig, {"temprature": 2.0}, "'temperature'"),
    ],
)
def test_a_misspelt_keyword_gets_the_hint_of_the_dictionary(config_class, wrong, right):
    messages = []
    for build in (lambda: config_class(**wrong), lambda: config_class.from_dict(wrong)):
        with pytest.raises(SlimConfigError, match=right) as caught:
            build()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_equal_configs_have_equal_hashes(config):
    again = type(config).from_dict(config.to_dict())
    assert hash(again) == hash(config)
    assert {config: "found"}[again] == "found"
    assert copy.copy(config) == copy.deepcopy(config) == config


def test_numbers_that_are_equal_have_equal_hashes():
    assert hash(DistillationConfig(temperature=2)) == hash(DistillationConfig(temperature=2.0))
    assert hash(PruningConfig(sparsity=0.5)) != hash(PruningConfig(sparsity=0.25))


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
def test_what_is_no_whole_number_is_refused_with_the_least_that_is_allowed(value):
    with pytest.raises(SlimConfigError, match=r"`a\.b` must be a whole number of at least 1, got .*\. Set 2\.$"):
        require_whole("a.b", value, hint="Set 2.")
    require_whole("a.b", 7, least=7)
    with pytest.raises(SlimConfigError, match=r"at least 8, got 7\.$"):
        require_whole("a.b", 7, least=8)


JUNK = (None, True, 3, -1, 0, 2.5, float("nan"), "x", "32", [], [1], ["x"], {}, {"a": 1}, {"a": "x"}, [[1]], object())


def config_classes():
    found, waiting = [], [SlimConfig]
    while waiting:
        waiting += (classes := waiting.pop().__subclasses__())
        found += [one for one in classes if one.__module__.startswith("hf_slim.")]
    return sorted(found, key=lambda one: one.__name__)


def test_a_value_of_any_type_is_taken_or_refused_with_the_name_of_its_setting():
    classes = config_classes()
    assert len(classes) > 10
    for config_class in classes:
        for setting in fields(config_class):
            for value in JUNK:
                with contextlib.suppress(SlimConfigError):  # any other error fails the test
                    config_class(**{setting.name: value})


@pytest.mark.parametrize(
    ("config_class", "values", "says"),
    [
        (PruningConfig, {"round_to": 32.5}, "`round_to` must be"),
        (PruningConfig, {"regrow": "yes"}, "`regrow` must be true or false, got 'yes'"),
        (DistillationConfig, {"teacher": 3}, "`teacher` must be"),
        (DistillationConfig, {"hidden": True}, "`hidden` must be"),
        (QuantizationConfig, {"freeze": "half"}, "`freeze` must be"),
        (Scheme, {"activations": None}, "Scheme needs `weights`"),
    ],
)
def test_a_wrong_type_is_refused_in_words(config_class, values, says):
    with pytest.raises(SlimConfigError, match=says):
        config_class(**values)


@pytest.mark.parametrize(
    ("hint", "fits", "wrong"),
    [
        (int, 3, True), (float, 3, "3"), (bool, False, 0), (str, "a", None), (int | None, None, 2.5),
        (list[str], ("a", "b"), "ab"), (list[str], ["a"], [1]), (dict[str, float], {"a": 1}, {"a": "b"}),
        (dict[str, Any] | str | None, {"a": []}, 3), (tuple[str, ...], ["a"], [None]), (Literal["a", 3], 3, "b"),
        (PruningConfig | None, {"sparsity": 0.5}, 0.5),
    ],
)  # fmt: skip
def test_types_are_checked_as_hints_say(hint, fits, wrong):
    assert type_problem(fits, hint) is None
    assert type_problem(wrong, hint)
