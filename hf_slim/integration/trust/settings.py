"""Types and sizes of what `quantization_config` says, checked before modules are built from it.

Imported with the quantizer, so it needs nothing but the standard library.
"""

import math
from collections.abc import Callable
from typing import Any, NoReturn

from hf_slim.core.errors import SlimLoadError
from hf_slim.core.files.json_file import AGAIN, shown
from hf_slim.core.files.model_folder import Weights

MOST_LETTERS = 200  # of the name of a scheme
MOST_DIMENSIONS = 8  # of a weight
CODES_PER_BYTE = 8
LARGEST_COUNT = 2**20  # an attribute of a module, whatever the files hold


def check_types(settings: dict[str, Any]) -> None:
    """Raises SlimLoadError where a setting has another type than hf_slim writes.

    Args:
        settings: Keys of `quantization_config` as in config.json.
    """
    for name in ("mode", "version"):
        if not isinstance(settings[name], str):
            _refuse(name, "a text", settings[name])
    _check_each("shapes", settings["shapes"], _is_shape, "a list of sizes from 0")
    _check_each("attributes", settings["attributes"], _are_numbers, "a mapping from attributes to numbers")
    _check_each("layers", settings["layers"], _may_be_scheme, "the name of a scheme, or a mapping of its settings")
    _check_each("techniques", settings["techniques"], lambda value: isinstance(value, dict), "a mapping of settings")


def check_sizes(shapes: dict[str, list[int]], attributes: dict[str, dict[str, int | float]], weights: Weights) -> None:
    """Raises SlimLoadError where a size is larger than anything that the files could hold.

    Args:
        shapes: Tensors whose shape differs from what the model's config says.
        attributes: Numbers of modules that differ.
        weights: What the files hold; a weight may take one bit.
    """
    most = CODES_PER_BYTE * weights.size_bytes
    for path, shape in shapes.items():
        if max(math.prod(shape), *shape, 0) > most:
            _refuse(
                f"shapes.{shown(path)}", f"a shape of at most {most:,} values, which is what the files hold", shape
            )
    most = max(most, LARGEST_COUNT)
    for path, values in attributes.items():
        for name, value in values.items():
            if abs(value) > most:
                _refuse(f"attributes.{shown(path)}.{shown(name)}", f"a number up to {most:,}", value)


def _check_each(name: str, value: Any, fits: Callable[[Any], bool], what: str) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        _refuse(name, "a mapping", value)
    for key, inner in value.items():
        if not fits(inner):
            _refuse(f"{name}.{shown(key)}", what, inner)


def _is_shape(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) <= MOST_DIMENSIONS
    return is_list and all(type(size) is int and size >= 0 for size in value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and type(number) in (int, float) and math.isfinite(number)
        for name, number in value.items()
    )


def _may_be_scheme(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, str) and len(value) <= MOST_LETTERS)


def _refuse(name: str, allowed: str, got: object) -> NoReturn:
    raise SlimLoadError(
        f"`quantization_config.{name}` in config.json must be {allowed}, got {shown(got)}. The folder is damaged, or "
        f"was changed by hand. {AGAIN}"
    )
