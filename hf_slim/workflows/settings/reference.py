"""The Markdown pages of the reference, made from the settings."""

import re

from hf_slim.core.config import SlimConfig
from hf_slim.recipe import SECTIONS, Recipe
from hf_slim.workflows.settings.setting import Setting, paragraphs_of, settings_of

CARDS = {  # settings whose values are registered names with a method card: the page of their cards
    "pruning.criterion": "criteria",
    "quantization.observer": "observers",
    "quantization.scheme.weights.kind": "grids",
    "distillation.losses": "losses",
    "distillation.hidden.loss": "losses",
    "distillation.attention.loss": "losses",
}


def settings_reference() -> dict[str, str]:
    """The Markdown pages of the reference: file name -> content; one for the recipe, and one for each section."""
    pages = {"recipe.md": _recipe_page()}
    for name, config in SECTIONS.items():
        pages[f"{name}.md"] = _section_page(name, config)
    return pages


def _recipe_page() -> str:
    lines = [
        "# Settings of a recipe",
        "",
        "A recipe is one YAML file. These pages are generated from the code; `hf-slim settings` prints the same",
        "texts. In Python write `None`, `True` and `False` for `null`, `true` and `false`, and pass a config or a",
        'dictionary to a callback: `PruningCallback({"sparsity": {"heads": 0.5}})`.',
        "",
    ]
    for setting in settings_of(Recipe):
        lines += _markdown(setting, f"{setting.name}.md" if setting.name in SECTIONS else None)
    return "\n".join(lines).rstrip() + "\n"


def _section_page(name: str, config: type[SlimConfig]) -> str:
    lines = [f"# {name}", "", "\n\n".join(paragraphs_of(config)), ""]
    lines += [f"Section `{name}` of a recipe; in Python `{config.__name__}`.", ""]
    waiting, seen = settings_of(config, name), {}
    while waiting:
        setting = waiting.pop(0)
        lines += _markdown(setting)
        if setting.inner in seen:
            lines += [f"Its settings are those of `{seen[setting.inner]}`.", ""]
        elif setting.inner is not None:
            seen[setting.inner] = setting.path
            lines += ["\n\n".join(paragraphs_of(setting.inner)), "", f"In Python `{setting.inner.__name__}`.", ""]
            waiting = settings_of(setting.inner, setting.path) + waiting
    return "\n".join(lines).rstrip() + "\n"


def _markdown(setting: Setting, page: str | None = None) -> list[str]:
    level = "#" * min(max(1 + setting.path.count("."), 2), 4)
    value = re.sub(r"^default (.*)$", r"default `\1`", setting.default)
    lines = [
        f"{level} {setting.path.partition('.')[2] or setting.path}",
        "",
        f"`{setting.annotation}`, {value}",
        "",
        setting.doc,
        "",
    ]
    if page is not None:
        lines += [f"See [{setting.name}]({page}).", ""]
    if setting.names:
        card = CARDS.get(setting.path)
        linked = [f"[{name}](../methods/{card}.md#{name})" if card else f"`{name}`" for name in setting.names]
        lines += [f"Names: {', '.join(linked)}.", ""]
    if setting.keys:
        lines += [f"Keys: {', '.join(f'`{key}`' for key in setting.keys)}.", ""]
    return lines
