import pytest

from hf_slim import SlimError
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


def test_no_is_a_word_and_only_true_and_false_are_booleans(tmp_path):
    text = "model: m\noutput: o\ntraining: {save_strategy: no, use_cpu: true, disable_tqdm: false}\n"
    recipe = load_recipe(write(tmp_path, text), ["training.eval_strategy=no"])
    assert recipe.training == {"save_strategy": "no", "use_cpu": True, "disable_tqdm": False, "eval_strategy": "no"}


def test_a_recipe_says_what_is_in_use_and_the_rest_has_defaults(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert list(recipe.techniques) == ["pruning", "quantization"]
    assert recipe.quantization.scheme == "w8a8"
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
        ("pruning: {}", r"line 11: 'pruning' stands twice"),
        ("evaluation: {repeats: many}", r"whole number of at least 1, got 'many'"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, line, says):
    with pytest.raises(SlimError, match=says):
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
    with pytest.raises(SlimError, match=says):
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
    with pytest.raises(SlimError, match=says):
        load_recipe(write(tmp_path, text))


def test_overrides_replace_and_add_and_are_as_strict(tmp_path):
    path = write(tmp_path, GOOD)
    overrides = ["training.max_steps=3", "pruning.sparsity.ffn=0.5", "distillation.alpha=0.1"]
    recipe = load_recipe(path, overrides)
    assert (recipe.training["max_steps"], recipe.pruning.sparsity["ffn"], recipe.distillation.alpha) == (3, 0.5, 0.1)
    with pytest.raises(SlimError, match="'max_steps'"):
        load_recipe(path, ["training.max_step=3"])
    with pytest.raises(SlimError, match="key=value"):
        load_recipe(path, ["training.max_steps"])
