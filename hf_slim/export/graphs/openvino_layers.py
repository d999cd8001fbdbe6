"""Stand-ins for packed layers whose forward becomes constants of few bits, a conversion and a product in OpenVINO.

OpenVINO's CPU plugin knows this pattern and keeps the constants as they are.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from hf_slim.export.graphs.matrices import Groups
from hf_slim.export.graphs.onnx_layers import bias_of, hold_, keep_input_state_
from hf_slim.export.graphs.rounding import rounded, static_state
from hf_slim.quantization.layers.packed import PackedLinear


class GroupLinear(nn.Module):
    """A linear layer whose weight is computed from codes; its input is rounded before where the scheme says so."""

    def __init__(self, layer: PackedLinear, matrix: Groups):
        super().__init__()
        self.grid, self.bias = layer.scheme.activations, bias_of(layer)
        hold_(self, codes=matrix.codes, scale=matrix.scale)
        keep_input_state_(self, layer)

    def forward(self, input: Tensor) -> Tensor:
        """The output of the layer."""
        if self.grid is not None:
            input = rounded(input, self.grid, (-1,), static_state(self, self.grid))
        weight = self.codes.float() * self.scale
        return F.linear(input, weight.reshape(len(weight), -1), self.bias)


class GroupEmbedding(nn.Module):
    """Rows of codes, looked up before they are converted; shares its tensors with the head that it is tied to."""

    def __init__(self, matrix: Groups):
        super().__init__()
        hold_(self, codes=matrix.codes, scale=matrix.scale)

    def forward(self, input: Tensor) -> Tensor:
        """The rows of the tokens `input`."""
        tokens = input.flatten()
        rows = self.codes.index_select(0, tokens).float() * self.scale.index_select(0, tokens)
        return rows.view(*input.shape, -1)
