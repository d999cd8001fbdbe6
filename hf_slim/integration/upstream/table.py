"""The table as a whole: the part of each host in a file of its own."""

from hf_slim.integration.upstream.exporters import EXPORTERS
from hf_slim.integration.upstream.loading import LOADING
from hf_slim.integration.upstream.models import MODELS
from hf_slim.integration.upstream.optional_libraries import OPTIONAL_LIBRARIES
from hf_slim.integration.upstream.row import Upstream
from hf_slim.integration.upstream.torch_internals import TORCH
from hf_slim.integration.upstream.trainer import TRAINER

TABLE: tuple[Upstream, ...] = (*TRAINER, *LOADING, *MODELS, *TORCH, *EXPORTERS, *OPTIONAL_LIBRARIES)
