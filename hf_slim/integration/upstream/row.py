"""One row of the table of names of host libraries that hf_slim relies on."""

from dataclasses import dataclass
from enum import Enum


class Check(Enum):
    """The condition that a name must meet so that hf_slim works."""

    EXISTS = "can be imported"
    TAKES = "takes each of these parameters"
    TAKES_ONE = "takes one of these parameters"
    SETS = "is an attribute that the code of its class sets on every instance"
    SAYS = "has code in which these texts follow each other"
    EQUALS = "has this value"
    HAS = "makes, without arguments, an object that has each of these attributes"


@dataclass(frozen=True)
class Upstream:
    """A name that its library does not promise to keep.

    Attributes:
        name: Dotted path of the name, such as "transformers.trainer.Trainer.label_smoother".
        since: Oldest version of the library with which hf_slim has used it.
        files: Files of hf_slim that use it, relative to the package.
        why: What hf_slim uses it for, and what fails without it.
        check: Condition that it must meet.
        what: The parameters, texts, value or attributes that `check` needs.
    """

    name: str
    since: str
    files: tuple[str, ...]
    why: str
    check: Check = Check.EXISTS
    what: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """The package that must be installed."""
        return self.name.partition(".")[0]

    @property
    def attribute(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]
