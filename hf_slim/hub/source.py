"""Where a model and its data come from, for reports: names, sizes, licences, and names on the Hub."""

import importlib
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download, try_to_load_from_cache

from hf_slim.core.errors import is_own_mistake
from hf_slim.core.report import STDLIB
from hf_slim.data import BUILDERS, DataConfig
from hf_slim.integration.loading import display_name, located

HUB = "https://huggingface.co/"
LICENCE = ("license", "license_name", "license_link")
NOT_OF_MODEL = {"README.md", "report.json", "report.md", "report.png"}


def describe_model_source(spec: str) -> dict[str, Any]:
    """What is known of the model that a run starts from.

    Args:
        spec: A Hub id, a folder, or `package:<module>/<file>`, that has been loaded.
    Returns: `name`, `bytes` of its files, and what is found of `hub_id`, `license`, `license_name`, `license_link`.
    """
    path, arguments = located(spec)
    known: dict[str, Any] = {"name": display_name(spec)}
    if "gguf_file" in arguments:
        file = Path(path, arguments["gguf_file"])
        return known | {"bytes": file.stat().st_size} | _in_gguf(file)
    if Path(path).is_dir():
        return known | {"bytes": _bytes_of(Path(path))} | _in_card(Path(path, "README.md"))
    config, card = try_to_load_from_cache(path, "config.json"), _card_on_hub(path)
    if isinstance(config, str):
        known["bytes"] = _bytes_of(Path(config).parent)
    if isinstance(config, str) or card is not None:  # otherwise nothing says that the Hub has a model of this name
        known |= {"name": path, "hub_id": path}
    return known | _in_card(card)


def describe_data_source(config: DataConfig) -> dict[str, Any]:
    """What is known of a source of text: `name`, and `hub_id` of a dataset on the Hub, else None.

    Of a local file or folder the name alone is told, not where it lies.
    """
    if config.source == "stdlib":
        return {"name": STDLIB, "hub_id": None}
    is_local = "$" in config.source or Path(config.source).suffix in BUILDERS or Path(config.source).exists()
    if is_local:
        return {"name": PurePosixPath(config.source).name, "hub_id": None}
    return {"name": config.source, "hub_id": config.source}


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file() and file.name not in NOT_OF_MODEL)


def _card_on_hub(hub_id: str) -> Path | None:
    """The card of a model on the Hub, from the cache or downloaded; None where it cannot be had."""
    try:
        return Path(hf_hub_download(hub_id, "README.md"))
    except Exception as error:  # no network, no card: a report is written without it
        if is_own_mistake(error):
            raise
        return None


def _in_card(card: Path | None) -> dict[str, Any]:
    """The licence that a card names; nothing of a damaged one."""
    if card is None or not card.is_file():
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except Exception as error:  # YAML that somebody wrote
        if is_own_mistake(error):
            raise
        return {}
    return {name: data.get(name) for name in LICENCE if isinstance(data.get(name), str)}


def _in_gguf(file: Path) -> dict[str, Any]:
    """Licence and Hub id that a GGUF file names."""
    fields = importlib.import_module("gguf").GGUFReader(file).fields  # optional, and loading the file needed it

    def text(name: str) -> str | None:
        return str(fields[name].contents()) if name in fields else None

    names = {"license": "general.license", "license_name": "general.license.name"}
    names["license_link"] = "general.license.link"
    found = {key: text(name) for key, name in names.items()}
    address = text("general.source.repo_url") or text("general.repo_url") or ""
    found["hub_id"] = address.removeprefix(HUB) if address.startswith(HUB) else None
    return {key: value for key, value in found.items() if value}
