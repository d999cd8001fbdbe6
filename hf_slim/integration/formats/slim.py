"""hf_slim's own format: every model that hf_slim makes, as it is in memory."""

from typing import Any

import torch

from hf_slim.integration.formats.format import FORMATS, Candidate, SaveFormat


class SlimFormat(SaveFormat):
    """Codes as packed layers hold them, under the usual names; nothing is converted."""

    name = "slim"
    preference = 9
    holds = "everything that hf_slim makes"
    read_by = "transformers after `import hf_slim`"

    def refusal(self, candidate: Candidate) -> str | None:
        """None: the format holds every model."""
        return None

    def settings(self, candidate: Candidate, dtype: torch.dtype) -> dict[str, Any]:
        """Nothing besides what hf_slim itself writes."""
        return {}


FORMATS.register("slim")(SlimFormat())
