"""Registers "hf_slim" as a quantization method of transformers, without importing transformers.

`transformers.quantizers.auto` has the two tables that `from_pretrained` reads. Its import takes more than a second
(every quantizer of transformers, torch.distributed). So `import hf_slim` only adds a hook that runs when this module
is imported, which happens when any model is loaded.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

HOST = "transformers.quantizers.auto"


def register_when_loaded() -> None:
    """Registers the loader now if transformers is already imported, otherwise after its import; only once."""
    if HOST in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegistersAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistersAfterImport())


class _RegistersAfterImport(importlib.abc.MetaPathFinder):
    """A finder that is the first in the import system until `HOST` is imported; then it registers hf_slim."""

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
        module.__loader__ = self.inner  # `inspect.getsource` and others need the original loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        _register()


def _register() -> None:
    from hf_slim.integration.hf_quantizer import register  # imports classes of transformers, so not earlier

    register()
