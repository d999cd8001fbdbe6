"""Multiply-adds of a forward pass: one counter for reports and for pruning budgets.

One multiply-add is a multiplication and the addition of the product to a sum. Profilers count it as two FLOPs.
Additions of biases, norms, activation functions and embedding lookups are not counted.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from hf_slim.core.contracts import PackedLayer
from hf_slim.core.host import config_of

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
# names of the number of experts per token in routers, in the blocks around them and in their configs
EXPERTS_PER_TOKEN = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk")
# matrix products of torch -> index of the left factor among the arguments; the right factor is the next one
PRODUCTS = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.baddbmm: 1}
# prefix of torch's fused attention operators, such as _scaled_dot_product_flash_attention_for_cpu(query, key, value)
FUSED_ATTENTION = "_scaled_dot_product_"


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of one forward pass.

    Attributes:
        weights: Path of a weight -> multiply-adds of activations with it. Their sum per token does not depend on the
            length of a text. A weight that the forward pass does not use is missing.
        attention: Multiply-adds of activations with activations: queries with keys, and attention probabilities with
            values. Every query is counted with every key of the example, also if a mask hides the key.
    """

    weights: dict[str, int]
    attention: int


@torch.no_grad()
def count_multiply_adds(model: nn.Module, run: Callable[[], object], per_token: bool) -> MultiplyAdds:
    """Counts the multiply-adds of one forward pass of `model`.

    Layers are counted by their sizes, so packed and fake-quantized layers count as their float forms, and a layer with
    an adapter counts in addition to the layers of the adapter. Of fused experts (weights with three dimensions), only
    the number of experts per token is counted. A layer that runs several times is counted several times. A layer that
    does not run, such as an expert in a `ModuleList` that is not chosen, is not counted. Recurrent layers of torch
    (`nn.LSTM`) and attention kernels of other libraries are not counted.

    Args:
        model: On any device; also on the meta device, if `run` works without values.
        run: Runs one forward pass of `model` on one example, for example `lambda: model(**inputs)`.
        per_token: True: every run of a layer counts as one position, which gives multiply-adds per token for any
            length of the example. A layer that runs once per text, such as a pooler, counts once. For an encoder and a
            decoder it is one token of each. `attention` is always for the whole example. False: all positions are
            counted, which gives multiply-adds per example; for pictures and sounds.
    """
    products = _Products(model, per_token)
    handles = [handle for name, module in model.named_modules() for handle in products.watch(model, name, module)]
    try:
        with products:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return MultiplyAdds(dict(products.weights), products.attention)


def reads_tokens(inputs: Mapping[str, Any]) -> bool:
    """Whether an example is only text: all its tensors are integer tensors."""
    return not any(isinstance(value, Tensor) and value.is_floating_point() for value in inputs.values())


class _Products(TorchDispatchMode):
    """Counts known layers by hooks, and all other matrix products by intercepting torch's operators.

    Operators inside a known layer are ignored: its weight may be a dequantized copy, and its kernel a custom one.
    Outside, a product with a parameter, or with a copy of a parameter, is counted for that parameter.
    """

    def __init__(self, model: nn.Module, per_token: bool):
        super().__init__()
        self.weights: defaultdict[str, int] = defaultdict(int)
        self.attention = 0
        self._per_token, self._depth = per_token, 0
        self._paths = {_address(parameter): name for name, parameter in model.named_parameters()}
        self._paths.pop(0, None)
        self._alive: list[Tensor] = []  # keeps tensors in memory, so that no address in _paths is used again

    def watch(self, model: nn.Module, name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks that count `module`, if it is a known layer."""
        costs = {f"{name}.{key}".lstrip("."): cost for key, cost in _costs(model, name, module).items()}
        if not costs:
            return

        def enter(module: nn.Module, arguments: tuple) -> None:
            self._depth += 1

        def leave(module: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> None:
            self._depth -= 1
            value = next(_tensors((*arguments, *named.values())))
            positions = 1 if self._per_token else _positions(module, value, output)
            for path, cost in costs.items():
                self.weights[path] += cost * positions

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave, with_kwargs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self._depth and not self._count(getattr(func, "overloadpacket", None), args, made):
            self._note_copies(args, made)
        return made

    def _count(self, operator: Any, args: tuple, made: Any) -> bool:
        """Counts `operator` if it is a matrix product. Returns whether it is."""
        if operator in PRODUCTS:
            left, right = args[PRODUCTS[operator] :][:2]
            self._add(left, right, left.numel() * right.shape[-1], is_sum=left.shape[-1] > 1)
        elif operator is torch.ops.aten.convolution:
            value, weight, transposed = args[0], args[1], args[6]
            positions = value.numel() // value.shape[1] if transposed else made.numel() // made.shape[1]
            self._add(value, weight, weight.numel() * positions, is_sum=True)
        elif operator is not None and operator.__name__.startswith(FUSED_ATTENTION):
            query, key, value = args[:3]
            scores = query.numel() // query.shape[-1] * key.shape[-2]
            self.attention += scores * (query.shape[-1] + value.shape[-1])
        else:
            return False
        return True

    def _add(self, left: Tensor, right: Tensor, cost: int, is_sum: bool) -> None:
        weights = [factor for factor in (left, right) if _address(factor) in self._paths]
        if weights:
            weight = max(weights, key=Tensor.numel)  # a learned input, such as a class token, times a matrix
            self.weights[self._paths[_address(weight)]] += weight.numel() if self._per_token else cost
        elif is_sum:  # an outer product has no sum; some rotary embeddings compute their angles with one
            self.attention += cost

    def _note_copies(self, args: tuple, made: Any) -> None:
        """A tensor that is computed only from parameters, such as a cast copy, counts for the first of them."""
        paths = [path for path in (self._paths.get(_address(tensor)) for tensor in _tensors(args)) if path]
        if paths and len(paths) == len(list(_tensors(args))):
            for tensor in _tensors((made,)):
                if address := _address(tensor):
                    self._paths.setdefault(address, paths[0])
                    self._alive.append(tensor)


def _costs(model: nn.Module, path: str, module: nn.Module) -> dict[str, int]:
    """Names of the weights of a known layer -> multiply-adds at one position."""
    if isinstance(module, nn.Linear):
        return {"weight": module.in_features * module.out_features}
    if hasattr(module, "nf") and hasattr(module, "nx"):  # GPT-2's Conv1D
        rows, columns = module.get_parameter("weight").shape
        return {"weight": rows * columns}
    if isinstance(module, CONVOLUTIONS):
        return {"weight": module.in_channels * module.out_channels // module.groups * prod(module.kernel_size)}
    stacks = _stacks(module)
    return {name: _experts_per_token(model, path, count) * prod(matrix) for name, (count, *matrix) in stacks.items()}


def _stacks(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the fused weights of many experts, `(experts, rows, columns)` or `(experts, columns, rows)`."""
    own: dict[str, tuple[int, ...]] = {
        name: module.float_shape(name) if isinstance(module, PackedLayer) else tuple(weight.shape)
        for name, weight in module.named_parameters(recurse=False)
    }
    found = {name: shape for name, shape in own.items() if len(shape) == 3}
    counts = {shape[0] for shape in found.values()}
    is_mixture = len(found) > 1 or counts == {getattr(module, "num_experts", None)}
    return dict(found) if is_mixture and len(counts) == 1 and counts != {1} else {}


def _experts_per_token(model: nn.Module, path: str, count: int) -> int:
    """How many of `count` experts a token visits, from the layer, the modules around it or a config; otherwise all."""
    experts, block = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    configs = [config for module in (experts, block, model) if (config := config_of(module)) is not None]
    for owner in (experts, block, *block.children(), *configs):
        for name in EXPERTS_PER_TOKEN:
            number = getattr(owner, name, None)
            if isinstance(number, int) and 0 < number <= count:
                return number
    return count


def _positions(module: nn.Module, value: Tensor, output: Any) -> int:
    """The number of positions at which a layer ran: those of a convolution's output, or of another layer's input."""
    if not isinstance(module, CONVOLUTIONS):
        return value.numel() // value.shape[-1]
    return value.numel() // module.in_channels if module.transposed else output.numel() // module.out_channels


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _address(tensor: Tensor) -> int:
    """The address of a plain tensor's storage, equal for all views of it; 0 if it has none."""
    is_plain = type(tensor) in (Tensor, nn.Parameter)
    return tensor.untyped_storage().data_ptr() if is_plain else 0
