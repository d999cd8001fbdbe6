"""Fine-tune with the Trainer you have, and get a small model: quantization, pruning and distillation as callbacks.

Importing this package lets `from_pretrained` load compressed checkpoints.
"""

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimError
from hf_slim.core.lifecycle import convert, prepare
from hf_slim.distillation.callback import DistillationCallback
from hf_slim.distillation.config import DistillationConfig
from hf_slim.integration.hf_quantizer import register
from hf_slim.pruning.callback import PruningCallback
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.one_shot import prune
from hf_slim.quantization.callback import QuantizationCallback
from hf_slim.quantization.config import QuantizationConfig
from hf_slim.quantization.grids.grid import Grid
from hf_slim.quantization.scheme import Scheme
from hf_slim.student import StudentShape, make_student
from hf_slim.version import __version__

register()

__all__ = [
    "DistillationCallback",
    "DistillationConfig",
    "Grid",
    "PruningCallback",
    "PruningConfig",
    "QuantizationCallback",
    "QuantizationConfig",
    "Scheme",
    "SlimConfig",
    "SlimError",
    "StudentShape",
    "__version__",
    "convert",
    "make_student",
    "prepare",
    "prune",
]
