"""Explanations of all settings of a recipe, for `hf-slim settings` and for the reference pages."""

from hf_slim.workflows.settings.reference import settings_reference
from hf_slim.workflows.settings.terminal import describe_settings

__all__ = ["describe_settings", "settings_reference"]
