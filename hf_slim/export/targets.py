"""Every target of export, registered: whoever imports this file can ask `EXPORTERS` for any of them by its name."""

from hf_slim.export.exporter import EXPORTERS
from hf_slim.export.gguf import exporter as gguf  # noqa: F401
from hf_slim.export.graphs import onnx, openvino, torch_export  # noqa: F401

__all__ = ["EXPORTERS"]
