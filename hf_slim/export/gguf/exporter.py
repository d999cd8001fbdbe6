"""The target `gguf`: one file for llama.cpp, Ollama and LM Studio, packed from the trained codes themselves."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.errors import SlimError
from hf_slim.export.codes import float_values, schemes_of
from hf_slim.export.exporter import EXPORTERS, ExportConfig, Exporter, Verification
from hf_slim.export.gguf.architectures import ARCHITECTURES
from hf_slim.export.gguf.encoding import HELD, Encoded, encoded, padded_columns
from hf_slim.export.gguf.layout import Entry, Layout, layout_of
from hf_slim.export.gguf.metadata import add_to, metadata_of, notes_on, rope_factors
from hf_slim.export.gguf.running import runs_of
from hf_slim.export.gguf.tokenizer import tokenizer_metadata

FILE = "model.gguf"
SCALE = ".scale"  # instead of ".weight": the scale of a whole matrix
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Difference:
    """What was found when one tensor was read back."""

    values: int
    differing: int
    largest: float


class GgufExporter(Exporter):
    """One GGUF file. Needs the package `gguf`; runs the file too where `xllamacpp` (llama.cpp) is installed."""

    title = "one file for llama.cpp, Ollama and LM Studio"
    packages = ("gguf",)

    def refusal(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: ExportConfig) -> str:
        """Why GGUF, or llama.cpp, does not hold this model; "" if it does."""
        forms: Counter[str] = Counter()
        errors: dict[str, float] = {}
        try:
            layout = layout_of(model)
            tokenizer_metadata(tokenizer, _rows(layout))
            for tensor in _tensors(model, layout):
                forms[tensor.form] += tensor.count
                errors[tensor.name] = tensor.error
            metadata_of(layout, forms, "")
        except SlimError as error:
            return str(error)
        return "" if config.allow_rounding else _rounding(errors)

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, config: ExportConfig
    ) -> Path:
        """Writes `model.gguf`."""
        from gguf import GGMLQuantizationType, GGUFWriter

        layout, forms = layout_of(model), Counter()
        writer = GGUFWriter(folder / FILE, layout.architecture)
        for tensor in _tensors(model, layout):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=GGMLQuantizationType[tensor.form])
            if tensor.scale is not None:
                writer.add_tensor(_beside(tensor.name), np.array([tensor.scale], np.float32))
            forms[tensor.form] += tensor.count
        add_to(writer, metadata_of(layout, forms, Path(model.config.name_or_path).name or "model"))
        add_to(writer, tokenizer_metadata(tokenizer, _rows(layout)))
        writer.add_quantization_version(2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / FILE

    def verify(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path, config: ExportConfig
    ) -> Verification:
        """Reads the file with the package `gguf`, and compares every value with the model's."""
        layout = layout_of(model)
        found = list(_differences(model, layout, path))
        differing = sum(one.differing for one in found)
        if differing and not config.allow_rounding:
            raise SlimError(f"{differing} values of {path.name} are not those of the model. Please report it.")
        notes = notes_on(layout) + _activation_notes(model)
        values, largest = sum(one.values for one in found), max(one.largest for one in found)
        runs = runs_of(model, tokenizer, path) if layout.row.head else {}
        return Verification(len(found), values, differing, largest, runs, tuple(notes))

    def command(self, path: Path) -> str:
        """How llama.cpp runs the file."""
        from gguf import GGUFReader

        kind = GGUFReader(path).fields["general.architecture"].contents()
        encodes = any(row.name == kind and row.head is None for row in ARCHITECTURES.values())
        return f'{"llama-embedding" if encodes else "llama-cli"} -m {path} -p "Once upon a time"'


def _tensors(model: nn.Module, layout: Layout) -> Iterator[Encoded]:
    """Every tensor of the file, one at a time."""
    factors = rope_factors(layout) if layout.row.rope_factors else None
    if factors is not None:
        yield Encoded(ROPE_FACTORS, "F32", factors.numpy(), factors.numel())
    for entry in layout.entries:
        yield encoded(model, entry)


def _rounding(errors: dict[str, float]) -> str:
    """What rounding would do to tensors, by name, whose scales float16 does not hold; "" if it holds all."""
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst]:
        return ""
    count = sum(error > 0 for error in errors.values())
    return (
        f"{count} of {len(errors)} tensors have scales that float16 does not hold; the worst is '{worst}', whose "
        f"values would change by up to {errors[worst]:.1e} of themselves. {HELD} Train with such a scheme, and leave "
        "embeddings in floating point (`embeddings: null`), or allow the rounding (`--allow-rounding`)."
    )


def _rows(layout: Layout) -> int:
    return int(layout.base.get_input_embeddings().num_embeddings)


def _beside(name: str) -> str:
    return name.removesuffix(".weight") + SCALE


def _differences(model: nn.Module, layout: Layout, path: Path) -> Iterator[Difference]:
    """Every tensor in turn, read back and compared with the model's own values."""
    from gguf import GGUFReader, dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    expected_names = {entry.name for entry in layout.entries}
    for entry in layout.entries:
        tensor = tensors[entry.name]
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        if _beside(entry.name) in tensors:
            values = values * torch.from_numpy(np.array(tensors[_beside(entry.name)].data))
        yield _difference(values, _expected(model, entry))
    allowed = expected_names | {_beside(name) for name in expected_names} | {ROPE_FACTORS}
    if unknown := sorted(tensors.keys() - allowed):
        raise SlimError(f"{path.name} has tensors that the model lacks: {', '.join(unknown[:3])}. Please report it.")


def _expected(model: nn.Module, entry: Entry) -> torch.Tensor:
    values = entry.arranged(float_values(model, entry.path).float())
    return padded_columns(values, entry.columns) + entry.offset


def _difference(values: torch.Tensor, expected: torch.Tensor) -> Difference:
    if values.shape != expected.shape:
        raise SlimError(f"A tensor has shape {tuple(values.shape)}, not {tuple(expected.shape)}. Please report it.")
    wrong = values != expected
    relative = ((values - expected).abs() / expected.abs())[wrong]  # infinite where a zero is no zero any more
    return Difference(values.numel(), int(wrong.sum()), float(relative.max()) if wrong.any() else 0.0)


def _activation_notes(model: nn.Module) -> list[str]:
    trained = sorted({str(scheme) for scheme in schemes_of(model).values() if scheme.activations is not None})
    if not trained:
        return []
    return [
        f"Trained with rounded activations ({', '.join(trained)}). llama.cpp rounds activations to 8 bits by itself, "
        "in blocks of 32 or 256 values instead of tokens, so outputs differ slightly."
    ]


EXPORTERS.register("gguf")(GgufExporter())
