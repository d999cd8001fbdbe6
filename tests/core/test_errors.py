"""Our own mistakes are told from what a host library raises about its input."""

import json
import textwrap
from types import FunctionType, ModuleType

from hf_slim import SlimConfigError, SlimDataError, SlimError, SlimLoadError
from hf_slim.core.errors import is_own_mistake


def module(name: str, source: str) -> ModuleType:
    """A module of this name, as if it were part of hf_slim where the name says so."""
    made = ModuleType(name)
    exec(textwrap.dedent(source), made.__dict__)
    return made


def as_ours(function: FunctionType) -> FunctionType:
    """The same function, as if it were defined in a module of hf_slim."""
    names = function.__globals__ | {"__name__": "hf_slim.somewhere"}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


OURS = module(
    "hf_slim.somewhere",
    """
    def misspelt():
        return no_such_name

    def caught(call, *arguments):
        try:
            return call(*arguments)
        except Exception as error:
            return error

    def called_back(value):
        return value + "text"
    """,
)


def test_a_mistake_of_ours_is_one_wherever_it_happens():
    assert is_own_mistake(OURS.caught(OURS.misspelt))
    assert is_own_mistake(OURS.caught(json.JSONDecoder(object_hook=lambda pairs: OURS.called_back(1)).decode, "{}"))


def test_what_the_host_raises_about_its_input_is_not():
    assert not is_own_mistake(OURS.caught(json.loads, "{"))
    assert not is_own_mistake(OURS.caught(json.loads, None))  # a TypeError, raised inside json
    assert not is_own_mistake(OURS.caught(json.JSONDecoder(object_hook=lambda pairs: int("x")).decode, "{}"))


def test_every_kind_is_a_slim_error_and_a_value_error():
    for kind in (SlimConfigError, SlimDataError, SlimLoadError):
        assert issubclass(kind, SlimError)
        assert issubclass(kind, ValueError)
