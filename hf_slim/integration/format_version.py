"""The number of the folder format, which defines the keys of `quantization_config` in a slim folder's config.json.

It changes when a folder written before could be read wrongly, and is no version of hf_slim.

1: hf_slim 0.1. `shapes` has the paths of linear layers; scales of weight groups are float32.
2: hf_slim 0.2. Scales of weight groups are bfloat16.
3: since then. `shapes` has the paths of tensors. Folders say `format_version` since hf_slim 0.3.
"""

from collections.abc import Iterable, Mapping

from hf_slim.core.errors import SlimLoadError
from hf_slim.version import __version__

FORMAT_VERSION = 3
OLDEST_READER = "hf_slim>=0.3"  # of what this version writes; config.json says it to people


def unnumbered_format(version: str, shapes: Iterable[str]) -> int:
    """The format, from 1 to 3, of a folder without a format number.

    Args:
        version: The version of hf_slim that wrote the folder; "" if unknown.
        shapes: Paths that its `shapes` name.
    """
    if version.startswith("0.1."):
        return 1
    return 3 if any(path.endswith(".weight") for path in shapes) else 2


def check_format(format_version: int, mode: str, layers: Mapping[str, object], version: str) -> None:
    """Raises SlimLoadError for a folder that this hf_slim cannot read: a newer format, or groups packed in format 1.

    Args:
        mode: "pruned", "qat" or "packed".
        layers: Path of a quantized layer -> its scheme.
        version: Of the hf_slim that wrote the folder.
    """
    if type(format_version) is not int or format_version < 1:
        raise SlimLoadError(
            f"`format_version` in config.json must be a whole number from 1, got {format_version!r}. The folder is "
            "damaged: fetch or make it again."
        )
    if format_version > FORMAT_VERSION:
        raise SlimLoadError(
            f"This folder has format {format_version} and was written by hf_slim {version or '(unknown)'}; hf_slim "
            f"{__version__}, which is installed, reads formats 1 to {FORMAT_VERSION}. Install hf_slim "
            f"{version or '(a newer one)'} or newer."
        )
    if format_version == 1 and mode == "packed" and any("-g" in str(scheme) for scheme in layers.values()):
        raise SlimLoadError(
            f"This checkpoint was packed by hf_slim {version}, which stored the scales of groups in float32; they "
            "are bfloat16 now. Pack it again from its training checkpoint, or install hf_slim 0.1."
        )
