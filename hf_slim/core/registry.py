"""Registries of named entries that a config can select: criteria, schemes, schedules."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from hf_slim.core.errors import SlimConfigError, SlimError, nearest

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """A dictionary whose error for an unknown name contains the most similar entry.

    Args:
        kind: Name of an entry in the singular, for error messages ("pruning criterion").
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """A decorator that registers a function or class as `name`. Raises SlimError if the name is in use."""

        def add(entry: Entry) -> Entry:
            if name in self._entries:
                raise SlimError(f"{self.kind} '{name}' is already registered. Choose another name for the new one.")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise SlimConfigError(f"Unknown {self.kind} '{name}'. {nearest(str(name), self._entries)}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
