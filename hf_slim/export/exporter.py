"""What a target of export does, and the registry of targets."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.config import SlimConfig
from hf_slim.core.registry import Registry


@dataclass(frozen=True)
class ExportConfig(SlimConfig):
    """How a model is exported; the same settings for every target."""

    allow_rounding: bool = False
    """Whether a weight that the format cannot hold exactly may be rounded. `false` refuses such a model, and says how
    large the error would be; `true` writes it and reports the error."""


@dataclass(frozen=True)
class Verification:
    """What was measured when an export was read back as its consumer reads it.

    Attributes:
        tensors: Tensors that were compared.
        values: Values that were compared.
        differing: Values that are not equal bit for bit to those of the model; 0 unless rounding was allowed.
        largest_error: The largest difference of a value, relative to that value.
        runs: What else was run, and its result: {"generate": "32 of 32 tokens equal"}. What was not run is absent.
        notes: What the user has to know, such as how the consumer rounds activations.
    """

    tensors: int
    values: int
    differing: int = 0
    largest_error: float = 0.0
    runs: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Exporter:
    """A target of export. Subclasses are stateless; one instance of each is registered in `EXPORTERS`.

    `refusal` is called first, then `write` into an empty folder, then `verify`. The folder is moved to where the user
    wants it only after that.

    Attributes:
        title: What it writes and for whom, in one line.
        packages: Names of the Python packages that it imports beyond those of hf_slim.
        extra: The extra of hf_slim that installs them.
    """

    title = ""
    packages: tuple[str, ...] = ()
    extra = "export"

    def refusal(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: ExportConfig) -> str:
        """Why this model cannot be written, and what could be done; "" if it can. Writes nothing.

        Args:
            model: Converted or loaded, in evaluation mode; packed, pruned or ordinary.
        """
        raise NotImplementedError

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, config: ExportConfig
    ) -> Path:
        """Writes the export into an empty folder. Returns the file in it that a consumer opens, or the folder."""
        raise NotImplementedError

    def verify(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, config: ExportConfig
    ) -> Verification:
        """Reads `path` back as its consumer does, and compares every value with the model.

        Raises: SlimError: if a value differs for another reason than rounding that was allowed.
        """
        raise NotImplementedError

    def command(self, path: Path) -> str:
        """One line that runs the export where it lies now, for a shell or for Python."""
        raise NotImplementedError

    def missing_packages(self) -> list[str]:
        """Those of `packages` that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


EXPORTERS: Registry[Exporter] = Registry("export target")
