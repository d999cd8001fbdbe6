"""Makes "hf_slim" known to transformers as a quantization method, without importing transformers.

`transformers.quantizers.auto` holds the two tables that `from_pretrained` reads, and importing it takes more than a
second (every quantizer of transformers, torch.distributed). So `import hf_slim` registers a callback for when
that module is imported, which loading any model does.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

HOST = "transformers.quantizers.auto"


def register_when_loaded() -> None:
    """Registers the loader now, if transformers has its tables already, else as soon as it has; once only."""
    if HOST in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegistersAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistersAfterImport())


class _RegistersAfterImport(importlib.abc.MetaPathFinder):
    """Stands in front of the import system until `HOST` is imported, and registers right after its code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The loader of `HOST`, and then the registration."""

    def __init__(self, inner: importlib.abc.Loader):
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.inner  # who asks for the source later finds the loader that has it
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        _register()


def _register() -> None:
    from hf_slim.integration.hf_quantizer import register  # extends classes of transformers, so not earlier

    register()
