"""Recipes: one YAML file that describes a whole run; unknown keys are errors."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimConfigError, SlimError, nearest
from hf_slim.data import DataConfig
from hf_slim.evaluation.config import EvaluationConfig
from hf_slim.evaluation.tasks import causal_lm, classification  # noqa: F401  registers the tasks
from hf_slim.evaluation.tasks.task import TASKS
from hf_slim.integration.techniques import TECHNIQUES
from hf_slim.integration.trainer import argument_problem
from hf_slim.progress import progress_is_shown
from hf_slim.student.shape import StudentShape
from hf_slim.vocabulary.rows import VocabularyConfig

TECHNIQUE_CONFIGS: dict[str, type[SlimConfig]] = {row.name: row.config for row in TECHNIQUES}
# techniques whose result cannot be trained further
LAST = tuple(row.name for row in TECHNIQUES if row.technique and not row.technique.trains_on)
OPTIONAL: dict[str, type[SlimConfig]] = {"vocabulary": VocabularyConfig, "student": StudentShape, **TECHNIQUE_CONFIGS}
SECTIONS: dict[str, type[SlimConfig]] = {"data": DataConfig, "evaluation": EvaluationConfig, **OPTIONAL}
LAID_OVER = ("data", "training")  # single settings of these change from stage to stage; a technique changes whole
STAGE_SECTIONS = (*LAID_OVER, "student", *TECHNIQUE_CONFIGS)
# the progress bar follows transformers' log level otherwise, which hf-slim keeps quiet
TRAINING_DEFAULTS = {"save_strategy": "no", "disable_tqdm": False}
SET_BY_HF_SLIM = {"output_dir": "the top-level `output`"}
Lines = dict[tuple[str, ...], int]


@dataclass(frozen=True)
class Recipe:
    """A whole run: a model, data, training arguments, the techniques in use, and how the result is measured."""

    model: str
    """The model to fine-tune: a Hub id, a folder with a saved model, or `package:<module>/<file>` for a file inside an
    installed Python package."""

    output: str
    """Folder that the compressed model and the report are written to."""

    task: str = field(default="causal-lm", metadata={"choices": TASKS})
    """Task that the model is trained for: a registered task."""

    data: DataConfig = field(default_factory=DataConfig)
    """The source of the text, and how it is split into examples."""

    vocabulary: VocabularyConfig | None = None
    """Removal of the tokens that the data never uses, before training. Absent: the vocabulary is kept."""

    student: StudentShape | None = None
    """Shape of a smaller model that is cut out of `model` and trained instead of it; the teacher `self` is then the
    model before the cut. Absent: `model` itself is trained."""

    training: dict[str, Any] = field(default_factory=dict)
    """Arguments of `transformers.TrainingArguments`, such as `max_steps` and `learning_rate`; all are allowed except
    `output_dir`. Defaults are those of transformers, except `save_strategy: no` and `disable_tqdm: false`."""

    techniques: dict[str, SlimConfig] = field(default_factory=dict)
    """The techniques in use: name -> config, in the order of the table. In a file each is a separate section."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How much is measured when the result is compared with the base."""

    stages: tuple["Recipe", ...] = ()
    """Several runs in order, each with the model that the one before produced. A stage is a mapping with the
    differences from the recipe: single settings of `data` and `training`, and whole sections `student`,
    `distillation`, `pruning` and `quantization` (`null` switches one off). Empty: the recipe is a single run."""

    @classmethod
    def of(cls, recipe: "Recipe | str | Path") -> "Recipe":
        """The recipe itself, or the one in the YAML file at this path."""
        return recipe if isinstance(recipe, cls) else load_recipe(recipe)

    @property
    def runs(self) -> tuple["Recipe", ...]:
        """The stages, or the recipe itself as the only one."""
        return self.stages or (self,)

    def section(self, name: str) -> SlimConfig | None:
        """The settings of one section, such as "data" or "pruning"; None if it is not used."""
        return self.techniques.get(name) if name in TECHNIQUE_CONFIGS else vars(self)[name]

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, without sections that are not used; of a stage, only the differences."""
        plain = {"model": self.model, "output": self.output, "task": self.task, "training": dict(self.training)}
        sections = {name: self.section(name) for name in SECTIONS}
        plain |= {name: config.to_dict() for name, config in sections.items() if config is not None}
        stages = [stage.to_dict() for stage in self.stages]
        changes = [{n: s.get(n) for n in STAGE_SECTIONS if s.get(n) != plain.get(n)} for s in stages]
        return plain | ({"stages": changes} if changes else {})

    def training_arguments(self, output_dir: str) -> TrainingArguments:
        """The Trainer's arguments. Raises SlimConfigError for a value that the Trainer does not accept."""
        without_bars = {} if progress_is_shown() else {"disable_tqdm": True}
        try:
            return TrainingArguments(output_dir=output_dir, **(TRAINING_DEFAULTS | self.training | without_bars))
        except (TypeError, ValueError, ImportError) as error:
            raise SlimConfigError(f"`training` was refused by TrainingArguments: {error}") from error


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file, or in the report.json of a run.

    Args:
        overrides: `section.key=value` pairs that replace or add values; the value is read as YAML.
    Raises: SlimConfigError: with file and line, for a key or value that is unknown, missing or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise SlimConfigError(f"The recipe '{path}' does not exist. The recipes of this project are in recipes/.")
    try:
        node = yaml.compose(_recipe_text(path), Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no UTF-8, JSON that is none
        raise SlimConfigError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}") from error
    lines: Lines = {}
    values = _plain(node, (), lines, str(path)) if node is not None else {}
    for override in overrides or []:
        _apply(override, values)
    return _build(values, lines, str(path))


def _recipe_text(path: Path) -> str:
    """The text of a recipe; of a report, the part that is its recipe."""
    text = path.read_text("utf-8")
    if path.suffix != ".json":
        return text
    found = json.loads(text)
    is_report = isinstance(found, dict) and "recipe" in found
    return json.dumps(found["recipe"], indent=2) if is_report else text


class _Loader(yaml.SafeLoader):
    """YAML with two changes: `1e-4` is a number, which YAML 1.1 reads as text; and `no` is text, not false."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own table, less its reading of booleans
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _plain(node: yaml.Node, path: tuple[str, ...], lines: Lines, file: str) -> Any:
    """The node as Python data; stores the line of every key, and raises SlimConfigError for a duplicate key."""
    if isinstance(node, yaml.MappingNode):
        values = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in values:
                raise SlimConfigError(f"{file}, line {line}: '{key}' occurs twice. Keep one of them.")
            lines[(*path, key)] = line
            is_bare = isinstance(value_node, yaml.ScalarNode) and value_node.value == ""
            # `pruning:` alone means its defaults; `pruning: null` means none
            values[key] = {} if is_bare and key in SECTIONS else _plain(value_node, (*path, key), lines, file)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, str(number)), lines, file) for number, item in enumerate(node.value, 1)]
    return _Loader("").construct_object(node)


def _apply(override: str, values: dict[str, Any]) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise SlimConfigError(f"An override must be `key=value` or `section.key=value`, got '{override}'.")
    *parents, key = name.split(".")
    for parent in parents:
        if isinstance(values, list):  # stages are counted from 1
            inside = values[int(parent) - 1] if parent.isdigit() and 0 < int(parent) <= len(values) else None
        else:
            inside = values.setdefault(parent, {})
        if not isinstance(inside, dict | list):
            raise SlimConfigError(f"Override '{override}': '{parent}' is not a section.")
        values = inside
    if isinstance(values, list):
        raise SlimConfigError(
            f"Override '{override}': write which stage and what, such as `stages.1.training.max_steps=9`."
        )
    values[key] = yaml.load(text, Loader=_Loader)


def _build(values: Any, lines: Lines, file: str) -> Recipe:
    if not isinstance(values, dict):
        raise SlimConfigError(f"'{file}' must hold a mapping with `model` and `output`, got {type(values).__name__}.")
    allowed = [*(f.name for f in fields(Recipe) if f.name != "techniques"), *TECHNIQUE_CONFIGS]
    _check_keys(values, (), allowed, lines, file)
    for required in ("model", "output"):
        if not isinstance(values.get(required), str) or not values[required]:
            raise SlimConfigError(f"'{file}' needs `{required}`, a non-empty text; got {values.get(required)!r}.")
    built: dict[str, Any] = {name: values[name] for name in ("model", "output", "task") if name in values}
    built["output"] = os.path.expanduser(values["output"])
    sections = {
        name: _section(name, config_class, values[name], lines, file)
        for name, config_class in SECTIONS.items()
        if values.get(name) is not None
    }
    built["techniques"] = {name: sections.pop(name) for name in TECHNIQUE_CONFIGS if name in sections}
    built |= sections
    built["training"] = _training(values.get("training") or {}, lines, file)
    recipe = Recipe(**built, stages=_stages(values, lines, file))
    task = _located(lambda: TASKS[str(recipe.task)], "task", lines, file)
    _located(lambda: task.columns(recipe.data), "data", lines, file)
    return recipe


def _stages(values: dict[str, Any], lines: Lines, file: str) -> tuple[Recipe, ...]:
    """The recipe of every stage: the top level with the changes of the stage."""
    stages = values.get("stages")
    if stages is None:
        return ()
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise SlimConfigError(
            f"{file}, line {lines.get(('stages',), '?')}: `stages` must be a list of sections, one or more."
        )
    top = {name: value for name, value in values.items() if name != "stages"}
    built = []
    for number, stage in enumerate(stages, 1):
        place = ("stages", str(number))
        _check_keys(stage, place, list(STAGE_SECTIONS), lines, file)
        laid = {name: (top.get(name) or {}) | stage[name] for name in LAID_OVER if isinstance(stage.get(name), dict)}
        own_lines = {path[2:]: line for path, line in lines.items() if path[:2] == place}
        built.append(_build(top | stage | laid, lines | own_lines, file))
        for name in LAST if number < len(stages) else ():
            if name in built[-1].techniques:
                line = own_lines.get((name,)) or lines.get((name,), "?")
                raise SlimConfigError(
                    f"{file}, line {line}: stage {number} uses `{name}`, and the next one cannot train its result. "
                    f"Move `{name}` to the last stage, or write `{name}: null` in stage {number}."
                )
    return tuple(built)


def _located(build: Callable[[], Any], section: str, lines: Lines, file: str) -> Any:
    """The result of `build`; a SlimError that it raises gets the line of the section."""
    try:
        return build()
    except SlimError as error:
        raise SlimConfigError(f"{file}, line {lines.get((section,), '?')}, in `{section}`: {error}") from error


def _section(name: str, config_class: type[SlimConfig], values: Any, lines: Lines, file: str) -> SlimConfig:
    where = f"{file}, line {lines.get((name,), '?')}"
    if not isinstance(values, dict):
        raise SlimConfigError(f"{where}: `{name}` must be a mapping of settings, got {values!r}.")
    _check_keys(values, (name,), [f.name for f in fields(config_class)], lines, file)
    return _located(lambda: config_class.from_dict(values), name, lines, file)


def _training(values: Any, lines: Lines, file: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise SlimConfigError(f"{file}: `training` must be a mapping of TrainingArguments fields, got {values!r}.")
    for key, instead in SET_BY_HF_SLIM.items():
        if key in values:
            raise SlimConfigError(
                f"{file}, line {lines.get(('training', key), '?')}: set {instead} instead of `training.{key}`."
            )
    allowed = [f.name for f in fields(TrainingArguments) if f.init]
    _check_keys(values, ("training",), allowed, lines, file)
    for key, value in values.items():
        if (wanted := argument_problem(key, value)) is not None:
            line = lines.get(("training", key), "?")
            raise SlimConfigError(f"{file}, line {line}: `training.{key}` must be {wanted}, got {value!r}.")
    return values


def _check_keys(values: dict, path: tuple[str, ...], allowed: list[str], lines: Lines, file: str) -> None:
    for key in values:
        if key not in allowed:
            where = f", line {lines[(*path, key)]}" if (*path, key) in lines else ""
            section = f" in `{'.'.join(path)}`" if path else ""
            hint = nearest(key, allowed)
            if len(allowed) > 30:  # TrainingArguments has over a hundred fields
                hint = hint.split("Allowed:")[0] + "Every TrainingArguments field is allowed."
            raise SlimConfigError(f"{file}{where}: unknown key '{key}'{section}. {hint}")
