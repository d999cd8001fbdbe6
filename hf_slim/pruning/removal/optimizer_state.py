"""Updates an optimizer after its parameters have become smaller."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def replace_parameter_(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, kept: dict[int, Tensor]) -> None:
    """Replaces `old` by `new`; moments and other state of its shape become smaller in the same way.

    Args:
        kept: Dimension -> indices of `old` that are kept in `new`.
    """
    for settings in optimizer.param_groups:
        settings["params"] = [new if parameter is old else parameter for parameter in settings["params"]]
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == old.shape:
                for dim, places in kept.items():
                    value = torch.index_select(value, dim, places.to(value.device))
                state[name] = value
        optimizer.state[new] = state


def forget_others_(optimizer: Optimizer, model: nn.Module) -> None:
    """Deletes parameters that are no longer in the model, such as those of removed layers."""
    present = {id(parameter) for parameter in model.parameters()}
    for settings in optimizer.param_groups:
        absent = [parameter for parameter in settings["params"] if id(parameter) not in present]
        settings["params"] = [parameter for parameter in settings["params"] if id(parameter) in present]
        for parameter in absent:
            optimizer.state.pop(parameter, None)
