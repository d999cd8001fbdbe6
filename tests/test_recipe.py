import dataclasses
import json
import typing

import pytest
import yaml
from transformers import TrainingArguments

from hf_slim import SlimConfigError
from hf_slim.core.config import type_problem
from hf_slim.recipe import load_recipe

GOOD = """\
model: some/model
output: runs/x
data:
  source: stdlib
training:
  max_steps: 10
  learning_rate: 1e-4
pruning:
  sparsity: {ffn: 0.25}
quantization:
"""


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_the_report_of_a_run_is_its_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"title": "\ud835\udd09 ran", "recipe": recipe.to_dict(), "base": {}}))
    again = load_recipe(report, ["output=again"])
    assert again.to_dict() == recipe.to_dict() | {"output": "again"}
    assert again.techniques == recipe.techniques
    report.write_text('{"recipe": ')
    with pytest.raises(SlimConfigError, match=r"report\.json"):
        load_recipe(report)


def test_no_is_a_word_and_only_true_and_false_are_booleans(tmp_path):
    text = "model: m\noutput: o\ntraining: {save_strategy: no, use_cpu: true, disable_tqdm: false}\n"
    recipe = load_recipe(write(tmp_path, text), ["training.eval_strategy=no"])
    assert recipe.training == {"save_strategy": "no", "use_cpu": True, "disable_tqdm": False, "eval_strategy": "no"}


def test_a_recipe_says_what_is_in_use_and_the_rest_has_defaults(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert list(recipe.techniques) == ["pruning", "quantization"]
    assert recipe.techniques["quantization"].scheme == "w8a8"
    assert recipe.data.block_size == 512
    assert recipe.training["learning_rate"] == pytest.approx(1e-4)  # YAML 1.1 alone would read text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("modle: x", r"line 11: unknown key 'modle'.*'model'"),
        ("prunning: {}", r"line 11.*'pruning'"),
        ("evaluation: {block: 3}", r"line 11.*'block' in `evaluation`.*'blocks'"),
        ("distillation: {alpha: 50}", r"line 11, in `distillation`.*\[0, 1\].*write 0\.5"),
        ("distillation: {temprature: 2}", r"line 11.*'temperature'"),
        ("distillation: yes", r"must be a mapping"),
        ("pruning: {}", r"line 11: 'pruning' occurs twice"),
        ("evaluation: {repeats: many}", r"whole number of at least 1, got 'many'"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, line, says):
    with pytest.raises(SlimConfigError, match=says):
        load_recipe(write(tmp_path, f"{GOOD}{line}\n"))


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ("{learning_rat: 1}", "'learning_rate'.*Every TrainingArguments field"),
        ("{evaluation_strategy: steps}", "'eval_strategy'"),
        ("{output_dir: x}", "top-level `output`"),
        ("{lr_scheduler_type: sideways}", "refused by TrainingArguments"),
    ],
)
def test_training_takes_every_field_of_the_trainer_and_no_other(tmp_path, training, says):
    path = write(tmp_path, f"model: m\noutput: o\ntraining: {training}\n")
    with pytest.raises(SlimConfigError, match=says):
        load_recipe(path).training_arguments(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs `model`"),
        ("- a\n- b\n", "must hold a mapping"),
        ("model: m\n", "needs `output`"),
        ("model: [m\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, says):
    with pytest.raises(SlimConfigError, match=says):
        load_recipe(write(tmp_path, text))


def test_overrides_replace_and_add_and_are_as_strict(tmp_path):
    path = write(tmp_path, GOOD)
    overrides = ["training.max_steps=3", "pruning.sparsity.ffn=0.5", "distillation.alpha=0.1"]
    recipe = load_recipe(path, overrides)
    assert (
        recipe.training["max_steps"],
        recipe.techniques["pruning"].sparsity["ffn"],
        recipe.techniques["distillation"].alpha,
    ) == (3, 0.5, 0.1)
    with pytest.raises(SlimConfigError, match="'max_steps'"):
        load_recipe(path, ["training.max_step=3"])
    with pytest.raises(SlimConfigError, match="key=value"):
        load_recipe(path, ["training.max_steps"])


STAGED = """\
model: m
output: o
data: {block_size: 64}
training: {max_steps: 10, learning_rate: 1e-3}
pruning: {sparsity: {ffn: 0.25}}
stages:
  - training: {learning_rate: 1e-4}
    pruning: null
  - data: {source: other}
  - pruning: {sparsity: {kv_heads: 0.5}}
    quantization:
"""


def test_a_stage_is_the_recipe_with_its_changes(tmp_path):
    recipe = load_recipe(write(tmp_path, STAGED))
    first, second, third = recipe.runs
    assert first.training == {"max_steps": 10, "learning_rate": pytest.approx(1e-4)}  # single settings are laid over
    assert first.techniques == {}
    assert (second.data.source, second.data.block_size) == ("other", 64)
    assert second.techniques["pruning"].sparsity["ffn"] == 0.25
    assert (
        third.techniques["pruning"].sparsity_by_kind["ffn"],
        third.techniques["pruning"].sparsity_by_kind["kv_heads"],
    ) == (
        0,
        0.5,
    )  # a technique changes whole
    assert list(third.techniques) == ["pruning", "quantization"]
    assert {stage.model for stage in recipe.runs} == {"m"}
    alone = load_recipe(write(tmp_path, GOOD))
    assert alone.runs == (alone,)


def test_a_recipe_with_stages_is_written_as_it_was_read(tmp_path):
    recipe = load_recipe(write(tmp_path, STAGED))
    plain = recipe.to_dict()
    assert [list(stage) for stage in plain["stages"]] == [
        ["training", "pruning"],
        ["data"],
        ["pruning", "quantization"],
    ]
    assert plain["stages"][0]["pruning"] is None
    path = write(tmp_path, yaml.safe_dump(plain))
    assert load_recipe(path) == recipe


def test_overrides_reach_into_a_stage(tmp_path):
    path = write(tmp_path, STAGED)
    recipe = load_recipe(path, ["stages.3.pruning.sparsity.kv_heads=0.25", "stages.2.training.max_steps=7"])
    assert recipe.runs[2].techniques["pruning"].sparsity["kv_heads"] == 0.25
    assert [stage.training["max_steps"] for stage in recipe.runs] == [10, 7, 10]
    for wrong in ("stages.4.pruning=null", "stages.0.pruning=null", "stages.first.pruning=null", "stages.1=null"):
        with pytest.raises(SlimConfigError, match=r"is not a section|stages\.1\.training"):
            load_recipe(path, [wrong])


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        (
            "[{pruning: {}, quantization: {}}, {}]",
            r"line 12: stage 1 uses `quantization`.*last stage.*: null`",
        ),
        ("[{prunning: {}}]", r"line 12: unknown key 'prunning' in `stages\.1`.*'pruning'"),
        ("[{model: x}]", r"line 12: unknown key 'model' in `stages\.1`"),
        ("[{pruning: {sparsity: 50}}]", r"line 12, in `pruning`.*share"),
        ("[{training: {max_step: 3}}]", r"line 12: unknown key 'max_step'"),
        ("[]", "must be a list of sections, one or more"),
        ("{pruning: {}}", "must be a list of sections"),
    ],
)
def test_a_mistake_in_a_stage_is_named_with_its_line(tmp_path, stages, says):
    with pytest.raises(SlimConfigError, match=says):
        load_recipe(write(tmp_path, f"{GOOD}distillation: null\nstages: {stages}\n"))


def test_quantization_at_the_top_is_refused_for_all_stages_but_the_last(tmp_path):
    text = f"{GOOD}stages:\n  - training: {{max_steps: 3}}\n  - pruning: null\n"
    with pytest.raises(SlimConfigError, match=r"line 10: stage 1 uses `quantization`"):
        load_recipe(write(tmp_path, text))
    cured = load_recipe(write(tmp_path, text), ["stages.1.quantization=null"])
    assert [list(stage.techniques) for stage in cured.runs] == [["pruning"], ["quantization"]]


def test_nothing_after_a_technique_means_its_defaults_and_null_means_none(tmp_path):
    assert "quantization" in load_recipe(write(tmp_path, GOOD)).techniques
    text = GOOD.replace("quantization:", "quantization: null")
    assert "quantization" not in load_recipe(write(tmp_path, text)).techniques
    assert "quantization" not in load_recipe(write(tmp_path, GOOD), ["quantization=null"]).techniques


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("task: sequence-clasification", r"line 11, in `task`.*'sequence-classification'"),
        ("vocabulary: {round_to: 0}", r"line 11, in `vocabulary`.*at least 1"),
        ("vocabulary: {round: 8}", r"line 11.*'round_to'"),
    ],
)
def test_a_mistake_in_task_or_vocabulary_is_named_with_its_line(tmp_path, line, says):
    with pytest.raises(SlimConfigError, match=says):
        load_recipe(write(tmp_path, f"{GOOD}{line}\n"))


def test_pairs_of_texts_are_for_tasks_that_read_pairs(tmp_path):
    text = "model: m\noutput: o\ndata: {text_column: [question, answer]}\n"
    with pytest.raises(SlimConfigError, match=r"line 3, in `data`.*reads one column"):
        load_recipe(write(tmp_path, text))
    recipe = load_recipe(write(tmp_path, text), ["task=sequence-classification"])
    assert recipe.data.text_columns == ["question", "answer"]


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ("max_steps: ten", r"`training\.max_steps` must be a whole number, got 'ten'"),
        ("max_steps: '20'", "must be a whole number, got '20'"),
        ("max_steps: 2.5", "must be a whole number"),
        ("max_steps: 0", "must be at least 1, or -1 for whole epochs, got 0"),
        ("max_steps: -5", "must be at least 1, or -1"),
        ("learning_rate: fast", r"`training\.learning_rate` must be a number"),
        ("learning_rate: -1", "must be at least 0"),
        ("seed: abc", "must be a whole number"),
        ("use_cpu: 'yes'", "must be true or false"),
        ("per_device_train_batch_size: 0", "must be at least 1"),
        ("num_train_epochs: 0", "must be above 0"),
    ],
)
def test_values_of_training_are_checked_before_anything_is_loaded(tmp_path, training, says):
    path = write(tmp_path, f"model: m\noutput: o\ntraining: {{{training}}}\n")
    with pytest.raises(SlimConfigError, match=rf"line 3: .*{says}"):
        load_recipe(path)


def test_every_default_of_the_trainer_passes_the_check_of_types(tmp_path):
    hints = typing.get_type_hints(TrainingArguments)
    for setting in dataclasses.fields(TrainingArguments):
        if setting.init and setting.default not in (dataclasses.MISSING, None):
            assert type_problem(setting.default, hints[setting.name]) is None, setting.name
