"""`import hf_slim`: light, and enough to load compressed checkpoints."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hf_slim
from hf_slim import PruningConfig, QuantizationConfig, convert, prepare
from tests import tiny

CONFIGS = [QuantizationConfig("w8a8"), PruningConfig(criterion="l2", uniform=False)]
ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "pandas", "tqdm", "yaml")


def in_new_process(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_importing_it_imports_no_other_library():
    assert in_new_process(f"import sys, hf_slim; print([name for name in {HEAVY} if name in sys.modules])") == "[]\n"


def test_the_command_line_helps_without_torch():
    code = """
import sys
from hf_slim.cli.main import main
for arguments in (["--help"], ["--version"], ["train", "--help"], ["make-student", "--help"], ["settings", "--help"]):
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 0, stop
print([name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""
    assert in_new_process(code).endswith("\n[]\n")


def test_loading_a_model_of_another_library_does_not_import_the_training_side():
    code = """
import sys, hf_slim
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
print("hf_slim" in AUTO_QUANTIZATION_CONFIG_MAPPING)
print([name for name in ("datasets", "pandas", "transformers.trainer") if name in sys.modules])
"""
    assert in_new_process(code) == "True\n[]\n"


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("config", CONFIGS, ids=["packed", "pruned"])
def test_a_compressed_checkpoint_loads_whatever_is_imported_first(config, order, tmp_path):
    convert(prepare(tiny.llama(), config)).save_pretrained(tmp_path)
    imports = ["import hf_slim", "from transformers import AutoModelForCausalLM"]
    lines = [*(imports if order == "first" else reversed(imports)), f"path = {str(tmp_path)!r}"]
    lines.append("print(type(AutoModelForCausalLM.from_pretrained(path)).__name__)")
    lines.append("import transformers.quantizers.auto as auto; print(auto.__loader__ is auto.__spec__.loader)")
    lines.append("import inspect; print('AUTO_QUANTIZER_MAPPING' in inspect.getsource(auto))")
    assert in_new_process("\n".join(lines)) == "LlamaForCausalLM\nTrue\nTrue\n"


@pytest.mark.parametrize(
    "lines",
    [
        "from hf_slim.core.lifecycle import prepare; from hf_slim.quantization.config import QuantizationConfig",
        "from hf_slim import QuantizationConfig, prepare",
    ],
)
def test_whoever_prepares_finds_every_technique_and_a_described_config(lines):
    code = f"""
{lines}
from tests import tiny
import sys
model = prepare(tiny.llama(), QuantizationConfig("w8a8"))
print(model.config.quantization_config.mode)
"""
    assert in_new_process(code) == "qat\n"


def test_every_public_name_is_there_and_documented():
    for name in hf_slim.__all__:
        value = getattr(hf_slim, name)
        assert name.startswith("_") or value.__doc__, name
        assert name.startswith("_") or value.__name__ == name
    assert set(hf_slim.__all__) <= set(dir(hf_slim))
    assert not hasattr(hf_slim, "no_such_name")


def test_editors_see_the_same_names_as_python():
    tree = ast.parse(Path(hf_slim.__file__).read_text())
    checked = next(
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {alias.name: node.module for node in checked.body for alias in node.names}
    assert seen == {name: f"hf_slim.{module}" for name, module in hf_slim._MODULES.items()}
    eager = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(hf_slim.__all__) == set(seen) | {name for name in eager if name.startswith("Slim")} | {"__version__"}
    assert all(hasattr(import_module(module), name) for name, module in seen.items())


def test_it_leaves_the_loggers_of_others_alone():
    code = """
import logging
from hf_slim import PruningCallback
print(logging.getLogger("bitsandbytes.backends.cpu.ops").filters)
"""
    assert in_new_process(code) == "[]\n"


def test_what_is_imported_while_a_checkpoint_loads_is_the_same():
    """transformers builds a model on the meta device and in its dtype; imports may happen then."""
    code = """
import contextlib, importlib, pkgutil, sys
import torch, hf_slim
def tensors(value):
    return {name: inner.tolist() for name, inner in vars(value).items() if isinstance(inner, torch.Tensor)}
with torch.device("meta") if "meta" in sys.argv else contextlib.nullcontext():
    torch.set_default_dtype(torch.bfloat16 if "meta" in sys.argv else torch.float32)
    found = pkgutil.walk_packages(hf_slim.__path__, "hf_slim.")
    modules = [module.name for module in found if "__main__" not in module.name]
    for name in modules:
        importlib.import_module(name)
from hf_slim.quantization.grids.grid import GRIDS
from hf_slim.quantization.grids.observers import MSE_RATIOS
print(len(modules), MSE_RATIOS, [(name, tensors(GRIDS[name])) for name in GRIDS])
print([(name, tensors(sys.modules[name])) for name in modules])
"""
    ordinary, loading = in_new_process(code), in_new_process(code, "meta")
    assert "'_ascending'" in ordinary
    assert loading == ordinary
