"""How a card says to load a model: one row for each stack that reads a format of folders."""

from dataclasses import dataclass
from typing import Any

PLAIN = """\
from transformers import {classes}

model = {auto_class}.from_pretrained({arguments})
"""
TOKENIZER = "tokenizer = AutoTokenizer.from_pretrained({arguments})\n"
STANDARD = ("compressed-tensors", "gemma", "bitsandbytes")
SLIM = "import hf_slim  # lets from_pretrained read this model\n"


@dataclass(frozen=True)
class Stack:
    """One way to load a model.

    Attributes:
        formats: Of the folders that it reads, as `folder.describe_saved` names them.
        name: For people.
        needs: What to install.
        snippet: Python code; `{classes}`, `{auto_class}` and `{arguments}` are filled in.
    """

    formats: tuple[str, ...]
    name: str
    needs: str
    snippet: str


STACKS: tuple[Stack, ...] = (
    Stack(("standard",), "Transformers", "transformers", PLAIN),
    Stack(("compressed-tensors",), "Transformers", "transformers compressed-tensors", PLAIN),
    Stack(("gemma",), "Transformers", "'transformers>=5.23'", PLAIN),
    Stack(("bitsandbytes",), "Transformers", "transformers bitsandbytes", PLAIN),
    Stack(("slim", *STANDARD), "Transformers with hf_slim", "hf_slim", SLIM + PLAIN),
)


def loading_section(saved: dict[str, Any], name: str, revision: str | None) -> str:
    """The section of a card that says how to load the model in every stack that reads it.

    Args:
        saved: What the report says about the folder.
        name: Folder or Hub id that the snippets load.
        revision: Of the Hub repository; None: its main branch.
    """
    form = saved["format"]
    stacks = [stack for stack in STACKS if form in stack.formats]
    # a quantization method of another library: Transformers loads it once that library is there
    stacks = stacks or [Stack((form,), "Transformers", f"transformers, and the library of {form}", PLAIN)]
    return "\n\n".join(["## Load it", *(_block(stack, saved, name, revision) for stack in stacks)])


def _block(stack: Stack, saved: dict[str, Any], name: str, revision: str | None) -> str:
    auto_class = saved["auto_class"]
    values = {
        "auto_class": auto_class,
        "classes": f"{auto_class}, AutoTokenizer" if saved["has_tokenizer"] else auto_class,
        "arguments": f'"{name}"' + (f', revision="{revision}"' if revision else ""),
    }
    code = stack.snippet + (TOKENIZER if saved["has_tokenizer"] else "")
    needed = f"`pip install {stack.needs}`" if "," not in stack.needs else stack.needs
    return f"{stack.name} ({needed}):\n\n```python\n{code.format(**values)}```"
