"""`hf-slim settings`, and the reference: what every setting of a recipe means."""

from hf_slim.workflows.settings.reference import settings_reference
from hf_slim.workflows.settings.terminal import describe_settings

__all__ = ["describe_settings", "settings_reference"]
