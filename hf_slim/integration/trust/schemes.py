"""Schemes and settings of techniques as a stranger's config.json gives them: made, or refused with their place."""

import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn, Union, get_args, get_origin

from hf_slim.core.config import SlimConfig
from hf_slim.core.errors import SlimError, SlimLoadError
from hf_slim.core.files.json_file import AGAIN, shown
from hf_slim.quantization.config import KV_CACHE, QuantizationConfig
from hf_slim.quantization.grids.grid import Grid
from hf_slim.quantization.scheme import Scheme

MOST = 1e30  # of a number: it must fit into float32


def schemes_of(layers: Mapping[str, str | dict[str, Any]], most: int | None = None) -> dict[str, Scheme]:
    """The scheme of every layer.

    Args:
        layers: Path -> scheme, by name or in full.
        most: The largest group that the files could hold; None: unknown.
    Raises: SlimLoadError: naming the layer, for what is no scheme.
    """
    found: dict[str, Scheme] = {}
    known: dict[str, Scheme] = {}  # the same few schemes for hundreds of layers
    for path, given in layers.items():
        key = repr(given)
        if key not in known:
            known[key] = _scheme(f"layers.{shown(path)}", given)
        found[path] = known[key]
        sizes = (found[path].weights.group_size or 0, found[path].weights.codebook_channels or 0)
        if most is not None and max(sizes) > most:
            _refuse(f"layers.{shown(path)}", f"groups larger than the {most:,} values that the files hold", given)
    return found


def quantization_settings(techniques: Mapping[str, dict[str, Any]], is_needed: bool) -> QuantizationConfig | None:
    """The settings of quantization that a folder records.

    Args:
        is_needed: Whether layers are built from them: a training checkpoint. Otherwise only `kv_cache` is looked at,
            because older folders may have settings that no longer exist, and None is returned.
    Raises: SlimLoadError: for settings that are missing or not allowed.
    """
    given = techniques.get("quantization")
    if not is_needed:
        kv_cache = (given or {}).get("kv_cache")
        if kv_cache is not None and kv_cache not in KV_CACHE:
            _refuse("techniques.quantization", f"another `kv_cache` than {', '.join(filter(None, KV_CACHE))}", given)
        return None
    if given is None:
        _refuse("techniques", "no settings of quantization, which a training checkpoint needs", dict(techniques))
    _check_types("techniques.quantization", QuantizationConfig, given)
    overrides = {f"overrides.{name}": scheme for name, scheme in (given.get("overrides") or {}).items()}
    for name, scheme in ({key: given.get(key) for key in ("scheme", "embeddings")} | overrides).items():
        if isinstance(scheme, str | dict):
            _scheme(f"techniques.quantization.{name}", scheme)
        elif scheme is not None:
            _refuse(f"techniques.quantization.{shown(name)}", "no scheme", scheme)
    try:
        return QuantizationConfig.from_dict(given)
    except (SlimError, ValueError, OverflowError) as error:
        _refuse("techniques.quantization", str(error), given, error)


def _scheme(name: str, given: str | dict[str, Any]) -> Scheme:
    if isinstance(given, dict):
        _check_types(name, Scheme, given)
        for part in ("weights", "activations"):
            if isinstance(given.get(part), dict):
                _check_types(f"{name}.{part}", Grid, given[part])
    try:
        return Scheme.of(given)
    except (SlimError, ValueError, OverflowError) as error:  # such as a group size of 5,000 digits
        _refuse(name, str(error), given, error)


def _check_types(name: str, cls: type[SlimConfig], values: dict[str, Any]) -> None:
    """Raises SlimLoadError where JSON gives a field another type than its annotation, or a required one is missing."""
    required = {f.name for f in fields(cls) if f.name == "weights"}
    if missing := required - values.keys():
        _refuse(name, f"no `{missing.pop()}`", values)
    for one in fields(cls):
        if one.name in values and not _fits(values[one.name], one.type):
            _refuse(f"{name}.{one.name}", "the wrong type", values[one.name])


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that JSON gave may stand where a field has this annotation."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, inner) for inner in get_args(hint))
    if hint is None or hint is types.NoneType:
        return value is None
    if hint is float:
        return type(value) in (int, float) and abs(value) <= MOST  # neither is NaN
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(inner, get_args(hint)[0]) for inner in value)
    if origin is dict or (isinstance(hint, type) and issubclass(hint, SlimConfig)):
        return isinstance(value, dict)
    return hint is Any or type(value) is hint


def _refuse(name: str, why: str, got: object, cause: Exception | None = None) -> NoReturn:
    raise SlimLoadError(
        f"`quantization_config.{name}` in config.json is {shown(got)}: {why}. The folder is damaged, or was changed "
        f"by hand. {AGAIN}"
    ) from cause
