"""Group sets of fused experts, whose 3-D weights the probe cannot analyse: whole experts, and neurons in them."""

from collections.abc import Iterator

from torch import nn

from hf_slim.core.host import parameter_or_none
from hf_slim.pruning.groups import GroupSet, Slice

# gate and up projection of all experts in one tensor, `(experts, 2 * neurons, hidden)`; the projection that reads it
GATE_UP, DOWN = "gate_up_proj", "down_proj"
MULTIPLE = 8  # grouped matrix products need rows of 16 bytes: 8 numbers in bfloat16


def expert_sets(model: nn.Module) -> Iterator[GroupSet]:
    """For each layer of fused experts: neuron `i` of all experts as one group; and each expert with its router row."""
    for name, module in model.named_modules():
        gate_up, down = parameter_or_none(module, GATE_UP), parameter_or_none(module, DOWN)
        if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter)) or gate_up.dim() != 3:
            continue
        neurons = down.shape[2]
        if gate_up.shape[1] == 2 * neurons and gate_up.shape[2] == down.shape[1]:
            slices = (
                Slice(f"{name}.{GATE_UP}", 1, 1),
                Slice(f"{name}.{GATE_UP}", 1, 1, offset=neurons),
                Slice(f"{name}.{DOWN}", 2, 1, reads=True),
            )
            yield GroupSet(f"{name}/ffn", "ffn", neurons, slices, multiple=MULTIPLE)
            yield from _whole_experts(model, name)


def _whole_experts(model: nn.Module, name: str) -> Iterator[GroupSet]:
    experts, (block, _, _) = model.get_submodule(name), name.rpartition(".")
    count = len(experts.get_parameter(DOWN))
    for path, router in model.get_submodule(block).named_children():
        weight = parameter_or_none(router, "weight")
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or len(weight) != count:
            continue
        router_path = f"{block}.{path}"
        slices = [Slice(f"{name}.{tensor}", 0, 1) for tensor in (GATE_UP, DOWN)]
        slices += [
            Slice(f"{router_path}.{tensor}", 0, 1)
            for tensor, values in (*router.named_parameters(recurse=False), *router.named_buffers(recurse=False))
            if values.shape[:1] == (count,)
        ]
        chosen = vars(router).get("top_k", 1)  # number of experts per token
        yield GroupSet(f"{name}/experts", "experts", count, tuple(slices), keep=chosen, masked_norms=(router_path,))
