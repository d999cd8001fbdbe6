"""Neurons within fused experts: 3-D weights that a cut model does not show."""

from collections.abc import Iterator

from torch import nn

from hf_slim.pruning.groups import GroupSet, Slice

# gate and up projection of all experts above each other, `(experts, 2 * neurons, hidden)`, and the one that reads them
GATE_UP, DOWN = "gate_up_proj", "down_proj"
MULTIPLE = 8  # grouped matrix products want rows of 16 bytes: 8 numbers in bfloat16


def expert_sets(model: nn.Module) -> Iterator[GroupSet]:
    """One set per layer of fused experts: neuron `i` of every expert is one group."""
    for name, module in model.named_modules():
        gate_up, down = getattr(module, GATE_UP, None), getattr(module, DOWN, None)
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
