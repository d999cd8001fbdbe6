"""What the optimizer of a run trains."""

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from hf_slim.core.errors import SlimConfigError


def require_trained(optimizer: Optimizer | None, model: nn.Module, added: Mapping[str, nn.Parameter]) -> None:
    """Checks that the optimizer of a run trains the parameters that a technique has added to the model.

    An optimizer that holds none of the model's parameters, such as one that has sharded or flattened them, is not
    checked.

    Args:
        optimizer: Of the run; None: it is not known.
        added: Name -> parameter.
    Raises: SlimConfigError: if the optimizer was made before the parameters were added.
    """
    if optimizer is None or not added:
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in trained for parameter in model.parameters()):
        return
    missing = [name for name, one in added.items() if one.requires_grad and id(one) not in trained]
    if missing:
        raise SlimConfigError(
            f"The optimizer does not train {len(missing)} parameters that were added to the model, such as "
            f"'{missing[0]}': it was made before them. Let the Trainer make it (`TrainingArguments(optim=...)` or "
            "`Trainer(optimizer_cls_and_kwargs=...)`), or make it after `hf_slim.prepare(model, config)`."
        )
