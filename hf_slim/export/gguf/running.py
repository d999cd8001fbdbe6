"""Runs a file in llama.cpp, where the package `xllamacpp` is installed, and compares it with the model.

llama.cpp rounds activations to 8 bits and keeps keys and values in float16, so its outputs are close to those of the
model and not equal: what was found is told, and only a large difference is an error.
"""

import importlib.util
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.errors import SlimError
from hf_slim.core.modules import device_of

RUNTIME = "xllamacpp"
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it's gone.\n",
    "def add(first, second):\n    return first + second  # 12 + 3456\n",
    "  na\u00efve caf\u00e9; \u4f60\u597d \U0001f600 don't \t 3.14159\n\n",
)
GENERATED = 24  # tokens
MOST_DIFFERENCE = 0.5  # of the log-probability of the likeliest token, in nats, on average: then it is another model
Ask = Callable[[str, dict[str, Any]], dict[str, Any]]  # (route, question) -> answer


def runs_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: Path) -> dict[str, str]:
    """What llama.cpp makes of a file: how it cuts texts, what it generates, how likely it finds tokens.

    Returns: what was compared -> the result; nothing where llama.cpp is not installed.
    Raises: SlimError: if llama.cpp does not load the file, or computes another model.
    """
    if tokenizer is None or importlib.util.find_spec(RUNTIME) is None:
        return {}
    server, ask = served(path)
    try:
        return {"tokens": _tokens(tokenizer, ask), **_generated(model, tokenizer, ask)}
    finally:
        del server  # ends its threads


def served(path: Path, **settings: Any) -> tuple[Any, Ask]:
    """A running server of llama.cpp for a file, and a function that asks it.

    Args:
        settings: Fields of `xllamacpp.CommonParams`.
    Raises: SlimError: if llama.cpp refuses the file.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    quiet = {"n_ctx": 512, "n_parallel": 1, "warmup": False, "verbosity": -1}
    for name, value in (quiet | settings).items():
        setattr(parameters, name, value)
    try:
        server = xllamacpp.Server(parameters)
    except Exception as error:  # whatever the C++ code raises
        raise SlimError(f"llama.cpp does not load {path.name}: {error}. Please report it.") from error

    def ask(route: str, question: dict[str, Any]) -> dict[str, Any]:
        data, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/{route}", data, kind)
        with urllib.request.urlopen(request) as answer:
            return dict(json.load(answer))

    return server, ask


def _tokens(tokenizer: PreTrainedTokenizerBase, ask: Ask) -> str:
    """How many texts llama.cpp cuts into the same tokens."""
    alike = sum(
        ask("tokenize", {"content": text, "add_special": True})["tokens"] == tokenizer(text)["input_ids"]
        for text in TEXTS
    )
    return f"{alike} of {len(TEXTS)} texts are cut alike by llama.cpp"


def _generated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ask: Ask) -> dict[str, str]:
    """Greedy tokens of llama.cpp against those of the model, and the likelihoods that both give to the same tokens."""
    prompt = tokenizer(TEXTS[0])["input_ids"]
    question = {"prompt": prompt, "n_predict": GENERATED, "n_probs": 1, "temperature": 0, "ignore_eos": True}
    answer = ask("completion", question).get("completion_probabilities")
    if not answer:  # only half a character was generated
        return {}
    ids = [token["id"] for token in answer]
    likely = log_likelihoods(model, prompt, ids)
    equal = sum(one == other for one, other in zip(ids, likely.argmax(dim=-1).tolist(), strict=True))
    own = likely[range(len(ids)), ids]
    difference = float((own - torch.tensor([token["logprob"] for token in answer])).abs().mean())
    if not difference < MOST_DIFFERENCE:
        raise SlimError(
            f"llama.cpp finds its tokens {difference:.2f} nats more or less likely than the model does: the file is "
            "another model. Please report it."
        )
    return {
        "generation": f"{equal} of {len(ids)} greedy tokens of llama.cpp are those of the model",
        "likelihood": f"log-probabilities differ by {difference:.4f} nats on average",
    }


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """Log-probabilities of every token at the places of `ids` behind a prompt: `(len(ids), vocabulary)`."""
    inputs = torch.tensor([prompt + ids], device=device_of(model))
    logits = model(input_ids=inputs).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(dim=-1).cpu()
