"""A packed folder in another format: the same values, for other readers."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from hf_slim.core.errors import SlimError, SlimLoadError
from hf_slim.core.host import config_value, field_of
from hf_slim.integration.config_json import save_as_
from hf_slim.integration.formats.format import FORMATS
from hf_slim.integration.formats.remote_code import FILE
from hf_slim.integration.hf_quantizer import SWITCH, HfSlimConfig
from hf_slim.integration.loading import class_of, load_config, load_model
from hf_slim.integration.saving import check_output, publish_folder

WEIGHTS = (".safetensors", ".safetensors.index.json")
# by the model itself; and the report and card of the other files, which speak of their digests and how to load them
REWRITTEN = ("config.json", "generation_config.json", FILE, "report.json", "README.md")


def convert_folder(
    folder: str | Path, to: str, output: str | Path | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Writes a packed model in another format: `hf-slim convert`. No value changes.

    Args:
        folder: A folder that hf_slim has written, packed, in any format.
        to: A format ("compressed-tensors", "gemma", "bitsandbytes", "slim"), or "auto": the first that fits.
        output: Folder for the result; None: next to `folder`, with the format after its name. Tokenizer and other
            files are copied; `report.json` and the card are not, because they are about the other files.
        overwrite: Replace a finished model in the output folder, once the new one is complete.
    Returns: `output`, `format`, `read_by`, and the bytes of the weights `before` and `after`.
    Raises: SlimError: if the folder is not packed, or the format does not hold it exactly; with the formats that do.
    """
    source = Path(folder)
    if not source.is_dir():
        raise SlimLoadError(
            f"'{source}' is no folder. Give one that hf_slim has saved; fetch a model of the Hub first."
        )
    model = load_model(str(source), _dtype(str(source)), class_of(str(source)))
    config = config_value(model, "quantization_config")
    if not isinstance(config, HfSlimConfig) or config.mode != "packed":
        raise SlimError(_not_packed(source, config))
    save_as_(model, to)
    target = Path(output) if output is not None else source.with_name(f"{source.name}-{config.save_format}")
    _check_target(target, source, overwrite)
    before = _weight_bytes(source)

    def write(partial: Path) -> None:
        model.save_pretrained(partial)
        for path in source.iterdir():
            if path.is_file() and path.name not in REWRITTEN and not path.name.endswith(WEIGHTS):
                shutil.copy2(path, partial / path.name)

    publish_folder(target, write)
    return {
        "output": str(target), "format": config.save_format, "read_by": FORMATS[config.save_format].read_by,
        "before": before, "after": _weight_bytes(target),
    }  # fmt: skip


def _check_target(target: Path, source: Path, overwrite: bool) -> None:
    if target.resolve() == source.resolve() and not overwrite:
        raise SlimError(
            f"`output` is the folder itself. Choose another one, or pass --overwrite to replace '{source}'."
        )
    check_output(target, overwrite)


def _dtype(folder: str) -> torch.dtype:
    """What the folder's float weights have."""
    dtype = load_config(folder).dtype
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype or "float32")


def _not_packed(source: Path, config: Any) -> str:
    mode = field_of(config, "mode")
    if mode == "qat":
        hint = "Finish its training, or load it, pack it with `hf_slim.convert` and save it."
        return f"'{source}' is a training checkpoint. {hint}"
    if mode == "pruned":
        return f"'{source}' is pruned and not quantized: there are no codes that another format could hold."
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 leaves '{source}' to transformers. Unset it, and convert again."
    return f"'{source}' was not packed by hf_slim, which can only convert folders of its own."


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
