"""Fine-tune with the Trainer you have, and get a small model: quantization, pruning and distillation as callbacks.

After importing this package, `from_pretrained` can load compressed checkpoints. Everything else is imported when it is
first used. The commands of `hf-slim` are functions of this package:

    train              run(recipe)                  train --dry-run    dry_run(recipe)
    inspect            inspect(model)               eval               evaluate(model, against)
    sensitivity        sensitivity(model, ...)      make-student       save_student(teacher, ...)
    shrink-vocabulary  shrink_vocabulary(model, ..) cache-teacher      cache_teacher(recipe)
    export             export_model(model, ...)
    card               write_card(folder)           push               push(folder, repo_id)
    convert            convert_folder(folder, to)
    verify             verify(folder)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_slim.core.errors import SlimConfigError, SlimDataError, SlimError, SlimHubError, SlimLoadError
from hf_slim.integration.registration import register_when_loaded
from hf_slim.version import __version__

if TYPE_CHECKING:  # for editors and type checkers, which do not run `__getattr__`
    from hf_slim.core.config import SlimConfig
    from hf_slim.core.lifecycle import convert, prepare
    from hf_slim.data import DataConfig
    from hf_slim.distillation.callback import DistillationCallback
    from hf_slim.distillation.config import DistillationConfig
    from hf_slim.distillation.losses.attention import AttentionConfig
    from hf_slim.distillation.losses.hidden_states import HiddenConfig
    from hf_slim.distillation.on_policy import OnPolicyConfig
    from hf_slim.evaluation.config import EvaluationConfig
    from hf_slim.pruning.callback import PruningCallback
    from hf_slim.pruning.config import PruningConfig
    from hf_slim.pruning.one_shot import prune
    from hf_slim.quantization.callback import QuantizationCallback
    from hf_slim.quantization.config import QuantizationConfig
    from hf_slim.quantization.grids.grid import Grid
    from hf_slim.quantization.scheme import Scheme
    from hf_slim.recipe import Recipe, load_recipe
    from hf_slim.student.make import make_student
    from hf_slim.student.shape import StudentShape
    from hf_slim.vocabulary.rows import VocabularyConfig
    from hf_slim.workflows.cache_teacher import cache_teacher
    from hf_slim.workflows.evaluate import evaluate
    from hf_slim.workflows.folders.convert import convert_folder
    from hf_slim.workflows.folders.export import export_model
    from hf_slim.workflows.folders.verify import verify
    from hf_slim.workflows.hub.card import write_card
    from hf_slim.workflows.hub.push import push
    from hf_slim.workflows.inspect import describe_model, inspect
    from hf_slim.workflows.make_student import save_student
    from hf_slim.workflows.plan import describe_recipe, dry_run
    from hf_slim.workflows.sensitivity import sensitivity
    from hf_slim.workflows.shrink_vocabulary import shrink_vocabulary
    from hf_slim.workflows.train import run

_MODULES = {  # public name -> module that defines it; the same as above
    "AttentionConfig": "distillation.losses.attention",
    "DataConfig": "data",
    "DistillationCallback": "distillation.callback",
    "DistillationConfig": "distillation.config",
    "EvaluationConfig": "evaluation.config",
    "Grid": "quantization.grids.grid",
    "HiddenConfig": "distillation.losses.hidden_states",
    "OnPolicyConfig": "distillation.on_policy",
    "PruningCallback": "pruning.callback",
    "PruningConfig": "pruning.config",
    "QuantizationCallback": "quantization.callback",
    "QuantizationConfig": "quantization.config",
    "Recipe": "recipe",
    "Scheme": "quantization.scheme",
    "SlimConfig": "core.config",
    "StudentShape": "student.shape",
    "VocabularyConfig": "vocabulary.rows",
    "cache_teacher": "workflows.cache_teacher",
    "convert": "core.lifecycle",
    "convert_folder": "workflows.folders.convert",
    "describe_model": "workflows.inspect",
    "describe_recipe": "workflows.plan",
    "dry_run": "workflows.plan",
    "evaluate": "workflows.evaluate",
    "export_model": "workflows.folders.export",
    "inspect": "workflows.inspect",
    "load_recipe": "recipe",
    "make_student": "student.make",
    "prepare": "core.lifecycle",
    "prune": "pruning.one_shot",
    "push": "workflows.hub.push",
    "run": "workflows.train",
    "save_student": "workflows.make_student",
    "sensitivity": "workflows.sensitivity",
    "shrink_vocabulary": "workflows.shrink_vocabulary",
    "write_card": "workflows.hub.card",
    "verify": "workflows.folders.verify",
}

__all__ = [
    "AttentionConfig",
    "DataConfig",
    "DistillationCallback",
    "DistillationConfig",
    "EvaluationConfig",
    "Grid",
    "HiddenConfig",
    "OnPolicyConfig",
    "PruningCallback",
    "PruningConfig",
    "QuantizationCallback",
    "QuantizationConfig",
    "Recipe",
    "Scheme",
    "SlimConfig",
    "SlimConfigError",
    "SlimDataError",
    "SlimError",
    "SlimHubError",
    "SlimLoadError",
    "StudentShape",
    "VocabularyConfig",
    "__version__",
    "cache_teacher",
    "convert",
    "convert_folder",
    "describe_model",
    "describe_recipe",
    "dry_run",
    "evaluate",
    "export_model",
    "inspect",
    "load_recipe",
    "make_student",
    "prepare",
    "prune",
    "push",
    "run",
    "save_student",
    "sensitivity",
    "shrink_vocabulary",
    "verify",
    "write_card",
]

register_when_loaded()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
