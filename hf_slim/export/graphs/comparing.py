"""Whether a graph computes what the model computes: on fresh tokens, of other lengths than it was traced with."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_slim.core.errors import SlimError
from hf_slim.export.graphs.interface import TEXT, Interface, continued, empty_cache, fresh
from hf_slim.integration.kv_cache import cache_of

Graph = Callable[[dict[str, Any]], Any]  # inputs by name -> outputs with the names of the model's
BATCHES = ((3, 9), (1, 6))  # rows and tokens; a batch of one has no padding
DECODED = 3  # tokens after each prompt
NOISE = 2.0**-20  # relative; as large as what the order of sums does to float32
ALLOWED = {torch.float32: 1e-4}
ALLOWED_16_BIT = 0.03  # a few steps of bfloat16
TIMES_THE_NOISE = 4  # how much more than the effect of noise a graph may differ


@dataclass(frozen=True)
class Comparison:
    """How far a graph is from its model.

    Attributes:
        difference: The largest difference of two logits, relative to the largest logit of that call.
        calls: Forward passes that were compared.
        equal_tokens, tokens: Greedy choices that are the same, and all of them.
        noise: What relative noise of `NOISE` in the embeddings does to the model itself; None: was not needed.
    """

    difference: float
    calls: int
    equal_tokens: int
    tokens: int
    noise: float | None = None

    def as_runs(self) -> dict[str, str]:
        """For `Verification.runs`."""
        found = "equal bit for bit" if self.difference == 0 else f"relative difference {self.difference:.1e}"
        if self.noise is not None:
            found += f" (noise of {NOISE:.0e} in the embeddings alone: {self.noise:.1e})"
        runs = {"logits": f"{found}, {self.calls} calls"}
        return runs | ({"greedy tokens": f"{self.equal_tokens} of {self.tokens} equal"} if self.tokens else {})


def compared(model: PreTrainedModel, graph: Graph, interface: Interface) -> Comparison:
    """Runs both on the same fresh inputs: a padded batch and a single text, for decoders a prompt and tokens after it.

    Args:
        graph: A graph that keeps its cache itself starts anew with every call whose cache is empty.
    Raises: SlimError: if the graph differs by more than rounding.
    """
    difference, calls, equal, tokens = 0.0, 0, 0, 0
    for expected, found in _pairs(model, graph, interface):
        calls += 1
        difference = max(difference, relative_difference(found, expected))
        if interface.cache is not None:
            equal += int((found[:, -1].argmax(-1) == expected[:, -1].argmax(-1)).sum())
            tokens += len(expected)
    allowed = ALLOWED.get(_dtype(model), ALLOWED_16_BIT)
    noise = noise_effect(model, interface) if difference > allowed else None
    allowed = max(allowed, TIMES_THE_NOISE * (noise or 0.0))
    if not difference <= allowed:
        raise SlimError(
            f"The graph computes something else than the model: logits differ by {difference:.1e} of the largest one, "
            f"and rounding explains {allowed:.1e}. Nothing was written. Please report it."
        )
    return Comparison(difference, calls, equal, tokens, noise)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value; infinite where values are no numbers."""
    worst = float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-30))
    return worst if not math.isnan(worst) else math.inf


def noise_effect(model: PreTrainedModel, interface: Interface) -> float:
    """The largest difference that relative noise of `NOISE` in what the model reads makes in its own outputs.

    Where inputs of layers are rounded, noise moves some of them to another code, and that grows from layer to layer.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0

    def disturbed(values: Tensor) -> Tensor:
        noise = torch.randn(values.shape, generator=generator).to(values.device, values.dtype)
        return values * (1 + max(NOISE, torch.finfo(values.dtype).eps) * noise)

    def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return disturbed(output)

    for rows, length in BATCHES:
        inputs = fresh(model, interface, rows, length, seed=1)
        expected = _read(model(**inputs), inputs)
        for _ in range(3):
            if TEXT[0] in inputs:
                handle = model.get_input_embeddings().register_forward_hook(hook)
                try:
                    found = _read(model(**inputs), inputs)
                finally:
                    handle.remove()
            else:
                found = _read(model(**{name: disturbed(value) for name, value in inputs.items()}), inputs)
            worst = max(worst, relative_difference(found, expected))
    return worst


def _pairs(model: PreTrainedModel, graph: Graph, interface: Interface) -> Iterator[tuple[Tensor, Tensor]]:
    """What the model and what the graph say, call after call."""
    for rows, length in BATCHES:
        inputs = fresh(model, interface, rows, length, seed=1)
        if interface.cache is None:
            yield _read(model(**inputs), inputs), _read(graph(inputs), inputs)
            continue
        caches = [empty_cache(model, rows), empty_cache(model, rows)]
        for _ in range(1 + DECODED):
            expected = model(**inputs, **{interface.cache: caches[0]}, use_cache=True)
            found = graph({**inputs, interface.cache: caches[1]})
            caches = [cache_of(expected), cache_of(found)]
            yield _read(expected, inputs), _read(found, inputs)
            inputs = continued(interface, inputs, expected.logits[:, -1:].argmax(-1))


def _read(outputs: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or what the model gives instead, without those of padding."""
    values = outputs["logits"] if "logits" in outputs else outputs[0]
    tokens, mask = inputs.get(TEXT[0]), inputs.get(TEXT[1])
    if tokens is not None and values.shape[:2] == tokens.shape:
        values = values * mask[:, -tokens.shape[1] :].unsqueeze(-1)
    return values.cpu()


def _dtype(model: PreTrainedModel) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
