"""Every setting is documented where it is declared, and found by its name."""

import dataclasses
from collections.abc import Iterator

import pytest

from hf_slim.core.config import SlimConfig, field_docs
from hf_slim.core.errors import SlimConfigError
from hf_slim.core.registry import Registry
from hf_slim.pruning.importance.criteria import CRITERIA, Criterion
from hf_slim.recipe import SECTIONS, Recipe
from hf_slim.workflows.settings import describe_settings, settings_reference
from hf_slim.workflows.settings.setting import settings_of


def subclasses(base: type) -> Iterator[type]:
    for config in base.__subclasses__():
        if config.__module__.startswith("hf_slim."):
            yield config
            yield from subclasses(config)


CONFIGS = [Recipe, *subclasses(SlimConfig)]


def test_all_configs_are_looked_at():
    assert len(CONFIGS) >= 13
    assert {*SECTIONS.values()} <= {*CONFIGS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_has_a_docstring_of_at_least_three_words(config):
    docs = field_docs(config)
    assert list(docs) == [field.name for field in dataclasses.fields(config)]
    for name, doc in docs.items():
        assert len(doc.split()) >= 3, f"{config.__name__}.{name}"
        assert doc.endswith("."), f"{config.__name__}.{name}"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_what_is_registered_is_named_by_the_registry(config):
    for setting in settings_of(config, "section"):
        if "registered" in setting.doc:
            assert isinstance(setting.choices, Registry), setting.path


def test_the_overview_names_every_setting():
    lines = describe_settings().splitlines()
    for section, config in SECTIONS.items():
        assert any(line.split()[:1] == [section] for line in lines)
        for field in dataclasses.fields(config):
            assert any(line.split()[:1] == [field.name] for line in lines), f"{section}.{field.name}"
    assert max(map(len, lines)) <= 100


def test_a_section_explains_its_settings_in_full():
    text = describe_settings("distillation.hidden")
    assert "distillation.hidden.pooled: bool, default false" in text
    assert "sentence embeddings" in text
    assert "distillation.alpha:" not in text


def test_a_setting_lists_what_is_registered_with_what_it_does():
    text = describe_settings("pruning.criterion")
    assert all(f"\n  {name} " in text for name in CRITERIA)
    assert "Molchanov" not in text  # the source is on the card
    assert "ffn_blocks" in text


def test_a_criterion_registered_later_appears(monkeypatch):
    def double(evidence):
        """Twice the importance of nothing."""

    monkeypatch.setitem(CRITERIA._entries, "double", Criterion(double))
    assert "double             Twice the importance of nothing." in describe_settings("pruning.criterion")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("model", "required"),
        ("stages", "Several runs in order"),
        ("training.learning_rate", "learning rate"),
        ("quantization.scheme.weights.bits", "Bits of one code"),
        ("quantization.embeddings.activations.granularity", "share one scale"),
        ("evaluation.prompt", r'default "def read_json(path):\n"'),
    ],
)
def test_settings_are_found_by_their_path(path, found):
    assert found in describe_settings(path)


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("prunning", "'pruning'"),
        ("pruning.sparsty", "'sparsity'"),
        ("criterion", "pruning.criterion"),
        ("training.lerning_rate", "'learning_rate'"),
        ("distillation.hidden.lose", "'loss'"),
        ("pruning.start.now", "one setting"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest(path, hint):
    with pytest.raises(SlimConfigError) as error:
        describe_settings(path)
    assert hint in str(error.value)
    assert len(str(error.value)) < 400


def test_the_reference_has_a_page_for_the_recipe_and_for_every_section():
    pages = settings_reference()
    assert {*pages} == {"recipe.md", *(f"{name}.md" for name in SECTIONS)}
    for name, config in SECTIONS.items():
        for setting in settings_of(config, name):
            assert f"\n## {setting.name}\n" in pages[f"{name}.md"]
            assert setting.doc in pages[f"{name}.md"]
