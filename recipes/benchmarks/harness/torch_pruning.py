"""SmolLM2 pruned by Torch-Pruning, in the ways that its pruner and criteria can be used here."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Setup:
    """One way to use Torch-Pruning.

    Attributes:
        importance: A class of `torch_pruning.pruner.importance`.
        arguments: Of that class.
        signal: What it reads besides weights: "nothing", "gradient", "squared gradient" or "activation".
        across_layers: Whether the neurons of all layers are ranked together; if not, every layer loses as many.
        query_heads: Share of query heads that is removed as well, the same number in every layer. Its pruner keeps all
            key-value heads, and ranks heads across layers only where there are as many of them as query heads.
    """

    importance: str
    arguments: dict[str, Any] = field(default_factory=dict)
    signal: str = "nothing"
    across_layers: bool = False
    query_heads: float = 0.0


SETUPS = {
    "random": Setup("RandomImportance"),
    "L1": Setup("MagnitudeImportance", {"p": 1}),
    "L2": Setup("MagnitudeImportance"),
    "L2, all layers": Setup("MagnitudeImportance", across_layers=True),
    "L2 of down_proj": Setup("MagnitudeImportance", {"group_reduction": "gate"}),
    "LAMP, all layers": Setup("LAMPImportance", across_layers=True),
    "geometric median": Setup("FPGMImportance"),
    "activation": Setup("ActivationImportance", signal="activation"),
    "activation, all layers": Setup("ActivationImportance", signal="activation", across_layers=True),
    "Hessian": Setup("HessianImportance", signal="squared gradient"),
    "Hessian, all layers": Setup("HessianImportance", {"normalizer": None}, "squared gradient", across_layers=True),
    "Taylor": Setup("TaylorImportance", signal="gradient"),
    "Taylor of the sum": Setup("TaylorImportance", {"multivariable": True}, "gradient"),
    "Taylor, all layers": Setup("TaylorImportance", {"normalizer": None}, "gradient", across_layers=True),
    "Taylor, and a third of the query heads": Setup("TaylorImportance", signal="gradient", query_heads=1 / 3),
}
BEST_SETUP = "Hessian, all layers"  # by `--criteria`


def transformer_parameters(model: PreTrainedModel) -> int:
    """All parameters but the token embedding, and the output layer tied to it."""
    shared = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in shared)


def torch_pruned(model: PreTrainedModel, setup: Setup, share: float, calibration: torch.Tensor) -> PreTrainedModel:
    """`model`, a Llama, without `share` of its transformer, pruned by Torch-Pruning in one shot.

    The hidden size stays, and with it the output layer tied to the embedding: pruning it unties them.

    Args:
        calibration: Token ids `(n_blocks, block size)`, for the criteria that read gradients or activations.
    """
    from torch_pruning.pruner import BasePruner, importance

    torch.manual_seed(42)
    criterion = getattr(importance, setup.importance)(**setup.arguments)
    _give_signal(model, setup.signal, criterion, calibration)
    # Tracing fails on a cache among the outputs, and finds the heads only in eager attention: in the other one it
    # takes query and key-value heads for the same number.
    attention, model.config.use_cache = model.config._attn_implementation, False
    model.set_attn_implementation("eager")
    ignored, num_heads = _roles(model, setup)
    BasePruner(
        model, torch.arange(8)[None], criterion, global_pruning=setup.across_layers, ignored_layers=ignored,
        pruning_ratio=_neuron_share(model, share, setup.query_heads), head_pruning_ratio=setup.query_heads,
        num_heads=num_heads, prune_num_heads=bool(num_heads), prune_head_dims=False,
        in_channel_groups={}, out_channel_groups={},  # the defaults are shared by all pruners and keep models alive
    ).step()  # fmt: skip
    for layer in model.model.layers:  # the one size that the forward pass does not read off the weights
        heads = layer.self_attn
        heads.num_key_value_groups = heads.q_proj.out_features // heads.k_proj.out_features
    model.zero_grad()
    model.config.use_cache = True
    model.set_attn_implementation(attention)
    return model


def _roles(model: PreTrainedModel, setup: Setup) -> tuple[list[nn.Module], dict[nn.Module, int]]:
    """The layers whose outputs stay, and how many heads each projection has where heads are removed."""
    ignored, num_heads = [model.lm_head, model.model.embed_tokens], {}
    for layer in model.model.layers:
        attention = layer.self_attn
        ignored += [attention.o_proj, layer.mlp.down_proj]  # they write the hidden states
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            if setup.query_heads:
                num_heads[projection] = projection.out_features // attention.head_dim
            else:
                ignored.append(projection)
    return ignored, num_heads


def _neuron_share(model: PreTrainedModel, share: float, query_heads: float) -> float:
    """Share of feed-forward neurons that removes `share` of the transformer, next to `query_heads`."""
    neurons = heads = 0
    for layer in model.model.layers:
        neurons += sum(parameter.numel() for parameter in layer.mlp.parameters())
        heads += layer.self_attn.q_proj.weight.numel() + layer.self_attn.o_proj.weight.numel()
    return (share * transformer_parameters(model) - query_heads * heads) / neurons


def _give_signal(model: PreTrainedModel, signal: str, criterion: Any, calibration: torch.Tensor) -> None:
    """Leaves in `model` what the criterion reads: in `grad`, or in the layers."""
    if signal == "activation":  # one batch: a second one would overwrite it
        with torch.no_grad(), criterion.compute_importance(model):
            model.model(input_ids=calibration, use_cache=False)
    elif signal == "gradient":
        for ids in calibration.split(1):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    elif signal == "squared gradient":  # not `criterion.accumulate_grad`, which in 1.6.1 keeps the last block alone
        squares = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for ids in calibration.split(1):
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            for square, parameter in zip(squares, model.parameters(), strict=True):
                square.addcmul_(parameter.grad, parameter.grad)
        for square, parameter in zip(squares, model.parameters(), strict=True):
            parameter.grad = square
