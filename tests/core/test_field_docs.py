"""Docstrings under fields are read from the source of a class."""

from dataclasses import dataclass, field

from hf_slim.core.config import SlimConfig, field_docs


@dataclass(frozen=True)
class Base(SlimConfig):
    """The class's own docstring belongs to no field."""

    first: int = 1
    """Stands in the
    base   class."""

    bare: int = 2
    second: str = field(default="a", metadata={"choices": ("a", "b")})
    """Has a `field`."""

    def method(self) -> None:
        """Belongs to no field either."""


@dataclass(frozen=True)
class Derived(Base):
    third: int = 3
    """Is new."""

    second: str = "b"
    """Is said anew."""


def test_docs_are_one_paragraph_each_in_the_order_of_the_fields():
    assert field_docs(Base) == {"first": "Stands in the base class.", "second": "Has a `field`."}


def test_inherited_fields_are_included_and_may_be_documented_again():
    assert field_docs(Derived) == {"first": "Stands in the base class.", "second": "Is said anew.", "third": "Is new."}
    assert list(field_docs(Derived)) == ["first", "second", "third"]


def test_a_class_without_source_has_no_docs():
    names = {"__name__": "typed_in", "SlimConfig": SlimConfig, "dataclass": dataclass}
    exec("@dataclass(frozen=True)\nclass Typed(SlimConfig):\n    size: int = 1\n    'Its size.'\n", names)
    assert field_docs(names["Typed"]) == {}


def test_the_result_may_be_changed_by_its_reader():
    field_docs(Base).clear()
    assert field_docs(Base)
