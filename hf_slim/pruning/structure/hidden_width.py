"""The hidden width: channels of the residual stream, with all layers that write, read or normalise them."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.autograd.graph import Node

from hf_slim.core.host import field_of, parameter_or_none
from hf_slim.pruning.groups import GroupSet, Refusal, Slice, common_ancestor
from hf_slim.pruning.matrices import is_experts, matrix_of
from hf_slim.pruning.structure.experts import DOWN, GATE_UP, MULTIPLE
from hf_slim.pruning.structure.probe import Output, Probe, Reading


def hidden_sets(model: nn.Module, probe: Probe) -> tuple[list[GroupSet], list[Refusal]]:
    """One set per width of the stream, whose group `i` is channel `i` in all layers; and reasons if there is none."""
    found, refusals = [], []
    widths = dict.fromkeys(output.channels for output in probe.outputs if output.is_stream and output.channels > 1)
    for width in widths:
        streams = [output for output in probe.outputs if output.is_stream and output.channels == width]
        connected = _Connected(streams)
        readers = [reading for reading in probe.readings if connected(reading.value)]
        norms = [reading for reading in probe.norms if connected(reading.value)]
        odd = [reading.layer for reading in readers + norms if reading.channels != width]
        if odd:
            refusals.append(Refusal("hidden", f"'{odd[0]}' reads the stream of {width} channels in another layout"))
            continue
        slices = tuple(_slices(model, streams, readers, norms, width))
        path = common_ancestor([output.layer for output in streams] + [reading.layer for reading in readers])
        name = f"{path}/hidden" if len(widths) == 1 else f"{path}/hidden-{width}"
        masked_norms = tuple(dict.fromkeys(reading.layer for reading in norms))
        multiple = MULTIPLE if any(is_experts(model.get_submodule(output.layer)) for output in streams) else 1
        found.append(GroupSet(name.strip("/"), "hidden", width, slices, multiple=multiple, masked_norms=masked_norms))
    return found, refusals


class _Connected:
    """Whether a tensor was computed from one of the streams by arithmetic only, without a layer in between."""

    def __init__(self, streams: list[Output]):
        self._leaves = {id(output.value) for output in streams}
        self._known: dict[Node, bool] = {}

    def __call__(self, value: Tensor) -> bool:
        root = value.grad_fn
        if root is None:
            return id(value) in self._leaves
        pending = [root]
        while pending:  # a recursion would be as deep as the model
            node = pending[-1]
            before = [child for child, _ in node.next_functions if child is not None]
            unknown = [child for child in before if child not in self._known]
            if unknown:
                pending += unknown
                continue
            is_leaf = id(field_of(node, "variable")) in self._leaves
            self._known[node] = is_leaf or any(self._known[child] for child in before)
            pending.pop()
        return self._known[root]


def _slices(
    model: nn.Module, streams: list[Output], readers: list[Reading], norms: list[Reading], width: int
) -> Iterator[Slice]:
    seen = set()
    for layer in dict.fromkeys(output.layer for output in streams):
        seen.add(layer)
        yield from _written(model, layer)
    for layer in dict.fromkeys(reading.layer for reading in norms):
        seen.add(layer)
        for name, _ in model.get_submodule(layer).named_parameters(recurse=False):
            yield Slice(f"{layer}.{name}", 0, 1)
    for layer in dict.fromkeys(reading.layer for reading in readers):
        seen.add(layer)
        yield Slice(f"{layer}.weight", matrix_of(model.get_submodule(layer)).in_dim, 1, reads=True)
    for layer, module in model.named_modules():  # routers, class tokens, positions: the probe does not replace them
        if layer not in seen and matrix_of(module) is None and not is_experts(module):
            is_vector_too = any(True for _ in module.children())  # a class token in the module of the embeddings
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.shape[-1:] == (width,) and (parameter.dim() > 1 or is_vector_too):
                    yield Slice(f"{layer}.{name}".lstrip("."), parameter.dim() - 1, 1)


def _written(model: nn.Module, layer: str) -> Iterator[Slice]:
    module = model.get_submodule(layer)
    if is_experts(module):
        yield Slice(f"{layer}.{DOWN}", 1, 1)
        yield Slice(f"{layer}.{GATE_UP}", 2, 1)
        return
    yield Slice(f"{layer}.weight", matrix_of(module).out_dim, 1)
    if parameter_or_none(module, "bias") is not None:
        yield Slice(f"{layer}.bias", 0, 1)
