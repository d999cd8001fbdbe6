"""A tiny decoder whose layers lie on many grids: one export of it says something about all of them."""

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_slim import QuantizationConfig, convert, prepare
from hf_slim.quantization.layers.families import family_of, packed_form
from hf_slim.quantization.layers.training import Training
from hf_slim.quantization.scheme import Scheme
from tests import tiny

# the layers of a decoder by the end of their name
WEIGHTS_ONLY = {
    "*.q_proj": "w4a16-g16", "*.k_proj": "w8a16", "*.v_proj": "w3a16-g48", "*.o_proj": "nf4-g16",
    "*.up_proj": "w2a16-g16", "*.down_proj": "w4a16-g32-asym",
}  # fmt: skip
BOTH_SIDES = {
    "*.q_proj": "w8a8", "*.k_proj": "w4a8", "*.v_proj": "w1.58a8", "*.o_proj": "w4a8-g16", "*.up_proj": "w8a8-static",
}  # fmt: skip


def decoder(scheme: str, overrides: dict[str, str], embeddings: str | None, **changes: object) -> PreTrainedModel:
    """A Llama of two layers, packed."""
    model = tiny.llama(num_hidden_layers=2, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)  # fresh norms are ones, which would hide a lost one
    return packed(model, scheme, overrides, embeddings)


def packed(
    model: PreTrainedModel, scheme: str, overrides: dict[str, str] | None = None, embeddings: str | None = None
) -> PreTrainedModel:
    """The model with packed layers; static scales are those of random tokens."""
    model.train()
    prepare(model, QuantizationConfig(scheme=scheme, overrides=overrides or {}, embeddings=embeddings))
    model(input_ids=tiny.tokens())
    return convert(model).eval()


def packed_layer(layer: nn.Module, scheme: str, inputs: torch.Tensor | None = None) -> nn.Module:
    """A layer on its own, packed; its groups need not divide its columns, as after pruning."""
    prepared = family_of(layer).fake_quantized(layer, Scheme.of(scheme), Training())
    if inputs is not None:
        prepared.train()(inputs)
    return packed_form(prepared).eval()
