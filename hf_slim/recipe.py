"""Recipes: one strict YAML file that says everything about a run."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimError, nearest
from hf_slim.distillation.config import DistillationConfig
from hf_slim.evaluation.compare import EvaluationConfig
from hf_slim.evaluation.data import DataConfig
from hf_slim.pruning.config import PruningConfig
from hf_slim.quantization.config import QuantizationConfig

TECHNIQUES: dict[str, type[SlimConfig]] = {
    "distillation": DistillationConfig,
    "pruning": PruningConfig,
    "quantization": QuantizationConfig,
}
SECTIONS: dict[str, type[SlimConfig]] = {"data": DataConfig, "evaluation": EvaluationConfig, **TECHNIQUES}
# the progress bar follows transformers' log level otherwise, which hf-slim keeps quiet
TRAINING_DEFAULTS = {"save_strategy": "no", "disable_tqdm": False}
SET_BY_HF_SLIM = {"output_dir": "the top-level `output`"}
Lines = dict[tuple[str, ...], int]


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        model: A Hub id, a folder, or `package:<module>/<file>`.
        output: Folder that the compressed model is written to.
        training: Fields of `TrainingArguments`.
    """

    model: str
    output: str
    data: DataConfig = field(default_factory=DataConfig)
    training: dict[str, Any] = field(default_factory=dict)
    distillation: DistillationConfig | None = None
    pruning: PruningConfig | None = None
    quantization: QuantizationConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def techniques(self) -> dict[str, SlimConfig]:
        """The techniques in use: name -> config."""
        return {name: config for name in TECHNIQUES if (config := getattr(self, name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, techniques that are not in use left out."""
        plain = {"model": self.model, "output": self.output, "training": dict(self.training)}
        sections = {name: getattr(self, name) for name in SECTIONS}
        return plain | {name: config.to_dict() for name, config in sections.items() if config is not None}

    def training_arguments(self, output_dir: str) -> TrainingArguments:
        """The Trainer's arguments. Raises SlimError where the Trainer refuses a value."""
        try:
            return TrainingArguments(output_dir=output_dir, **(TRAINING_DEFAULTS | self.training))
        except (TypeError, ValueError, ImportError) as error:
            raise SlimError(f"`training` was refused by TrainingArguments: {error}") from error


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a YAML file.

    Args:
        overrides: `section.key=value` pairs that replace or add values; the value is read as YAML.
    Raises: SlimError: naming file and line, for anything that is unknown, misspelt, missing or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise SlimError(f"The recipe '{path}' does not exist. Recipes of this project lie in recipes/.")
    try:
        node = yaml.compose(path.read_text("utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SlimError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}") from error
    lines: Lines = {}
    values = _plain(node, (), lines, str(path)) if node is not None else {}
    for override in overrides or []:
        _apply(override, values)
    return _build(values, lines, str(path))


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1.1 takes `1e-4` for text, and the `no` of `save_strategy: no` for false."""

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
    """The node as Python data; notes the line of every key and refuses a key that stands twice."""
    if isinstance(node, yaml.MappingNode):
        values = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in values:
                raise SlimError(f"{file}, line {line}: '{key}' stands twice. Keep one of them.")
            lines[(*path, key)] = line
            values[key] = _plain(value_node, (*path, key), lines, file)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, path, lines, file) for item in node.value]
    return _Loader("").construct_object(node)


def _apply(override: str, values: dict[str, Any]) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise SlimError(f"An override must be `key=value` or `section.key=value`, got '{override}'.")
    *parents, key = name.split(".")
    for parent in parents:
        if not isinstance(values.setdefault(parent, {}), dict):
            raise SlimError(f"Override '{override}': '{parent}' is not a section.")
        values = values[parent]
    values[key] = yaml.load(text, Loader=_Loader)


def _build(values: Any, lines: Lines, file: str) -> Recipe:
    if not isinstance(values, dict):
        raise SlimError(f"'{file}' must hold a mapping with `model` and `output`, got {type(values).__name__}.")
    allowed = [f.name for f in fields(Recipe)]
    _check_keys(values, (), allowed, lines, file)
    for required in ("model", "output"):
        if not isinstance(values.get(required), str) or not values[required]:
            raise SlimError(f"'{file}' needs `{required}`, a non-empty text; got {values.get(required)!r}.")
    built: dict[str, Any] = {"model": values["model"], "output": values["output"]}
    for name, config_class in SECTIONS.items():
        if values.get(name) is not None:
            built[name] = _section(name, config_class, values[name], lines, file)
        elif name in values and name in TECHNIQUES:  # `pruning:` alone means its defaults
            built[name] = config_class()
    built["training"] = _training(values.get("training") or {}, lines, file)
    return Recipe(**built)


def _section(name: str, config_class: type[SlimConfig], values: Any, lines: Lines, file: str) -> SlimConfig:
    where = f"{file}, line {lines.get((name,), '?')}"
    if not isinstance(values, dict):
        raise SlimError(f"{where}: `{name}` must be a mapping of settings, got {values!r}.")
    _check_keys(values, (name,), [f.name for f in fields(config_class)], lines, file)
    try:
        return config_class.from_dict(values)
    except SlimError as error:
        raise SlimError(f"{where}, in `{name}`: {error}") from error


def _training(values: Any, lines: Lines, file: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise SlimError(f"{file}: `training` must be a mapping of TrainingArguments fields, got {values!r}.")
    for key, instead in SET_BY_HF_SLIM.items():
        if key in values:
            raise SlimError(
                f"{file}, line {lines.get(('training', key), '?')}: set {instead} instead of `training.{key}`."
            )
    allowed = [f.name for f in fields(TrainingArguments) if f.init]
    _check_keys(values, ("training",), allowed, lines, file)
    return values


def _check_keys(values: dict, path: tuple[str, ...], allowed: list[str], lines: Lines, file: str) -> None:
    for key in values:
        if key not in allowed:
            where = f", line {lines[(*path, key)]}" if (*path, key) in lines else ""
            section = f" in `{'.'.join(path)}`" if path else ""
            hint = nearest(key, allowed)
            if len(allowed) > 30:  # TrainingArguments has over a hundred fields
                hint = hint.split("Allowed:")[0] + "Every TrainingArguments field is allowed."
            raise SlimError(f"{file}{where}: unknown key '{key}'{section}. {hint}")
