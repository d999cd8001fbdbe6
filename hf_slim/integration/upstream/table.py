"""The whole table; the rows of each host library are in a separate file."""

from hf_slim.integration.upstream.exporters import EXPORTERS
from hf_slim.integration.upstream.formats import SAVE_FORMATS
from hf_slim.integration.upstream.hub import HUB
from hf_slim.integration.upstream.loading import LOADING
from hf_slim.integration.upstream.models import MODELS
from hf_slim.integration.upstream.optional_libraries import OPTIONAL_LIBRARIES
from hf_slim.integration.upstream.row import Upstream
from hf_slim.integration.upstream.torch_internals import TORCH
from hf_slim.integration.upstream.trainer import TRAINER

TABLE: tuple[Upstream, ...] = (
    *TRAINER, *LOADING, *SAVE_FORMATS, *HUB, *MODELS, *TORCH, *EXPORTERS, *OPTIONAL_LIBRARIES,
)  # fmt: skip
