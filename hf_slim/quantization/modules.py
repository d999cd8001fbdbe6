"""Layers on a grid: fake-quantized while training, packed afterwards. Both hold the same values."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_slim.quantization.config import Scheme
from hf_slim.quantization.fake_quant import (
    dequantize_weight,
    fake_quantize_tokens,
    fake_quantize_weight,
    quantize_tokens,
    quantize_weight,
)
from hf_slim.quantization.packing import pack_codes, packed_bytes, unpack_codes


class FakeQuantLinear(nn.Linear):
    """A linear layer whose forward sees the weights and activations of its packed form; `weight` stays the master."""

    def __init__(self, linear: nn.Linear, scheme: Scheme):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.scheme = linear.weight, linear.bias, scheme
        self.kept_columns: Tensor | None = getattr(linear, "kept_columns", None)  # pruning keeps this up to date

    def forward(self, input: Tensor) -> Tensor:
        if self.scheme.activation_bits:
            input = fake_quantize_tokens(input, self.scheme.activation_bits)
        return F.linear(input, fake_quantize_weight(self.weight, self.scheme, self.kept_columns), self.bias)

    def plain(self) -> nn.Linear:
        """The ordinary layer with the same parameters."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear

    def packed(self) -> "PackedLinear":
        """The final layer, holding exactly the values that this one computes with."""
        layer = PackedLinear(self.in_features, self.out_features, self.bias is not None, self.scheme, device="meta")
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.detach())
        pack_weight_(layer, self.weight, self.scheme)
        return layer

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}"


class FakeQuantEmbedding(nn.Embedding):
    """An embedding that looks up rows of its packed form; a scale per row, so only the rows looked up are computed."""

    def __init__(self, embedding: nn.Embedding, scheme: Scheme):
        super().__init__(**_embedding_arguments(embedding), device="meta")
        self.weight, self.scheme = embedding.weight, scheme

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        return fake_quantize_weight(rows.flatten(0, -2), self.scheme).view(rows.shape)

    def plain(self) -> nn.Embedding:
        """The ordinary embedding with the same parameter."""
        embedding = nn.Embedding(**_embedding_arguments(self), device="meta")
        embedding.weight = self.weight
        return embedding

    def packed(self) -> "PackedEmbedding":
        """The final embedding, holding exactly the values that this one looks up."""
        layer = PackedEmbedding(
            **_embedding_arguments(self), scheme=self.scheme, dtype=self.weight.dtype, device="meta"
        )
        pack_weight_(layer, self.weight, self.scheme)
        return layer


class PackedLinear(nn.Linear):
    """A linear layer in integers.

    `weight` is int8 `(out_features, n_groups, n_bytes)` and `weight_scale` float32 `(out_features, n_groups)`: three
    dimensions under the usual name, so that loading without hf_slim fails loudly instead of reading codes as weights.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, scheme: Scheme, device: str | torch.device | None = None
    ):
        super().__init__(in_features, out_features, bias, device=device)
        self.scheme = scheme
        empty_weight_(self, scheme, device)

    def forward(self, input: Tensor) -> Tensor:
        if self.kernel(input) == "int8":
            return int8_linear(input, self.weight, self.weight_scale, self.bias)
        if self.scheme.activation_bits:
            input = fake_quantize_tokens(input, self.scheme.activation_bits)
        return F.linear(input, self.dequantized(input.dtype), self.bias)

    def kernel(self, input: Tensor) -> str:
        """How `forward` computes: 'int8' on integer matrix units, 'dequantize' through a float copy of this layer."""
        scheme = self.scheme
        if (scheme.weight_bits, scheme.activation_bits, scheme.group_size) != (8, 8, None) or not self.weight.numel():
            return "dequantize"
        if torch.is_grad_enabled() and input.requires_grad:  # integer matrix products have no gradient
            return "dequantize"
        return "int8" if input.device.type == "cpu" else "dequantize"

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight in floating point: `(out_features, in_features)`."""
        codes = unpack_codes(self.weight, self.scheme.weight_bits, self.scheme.group_size or self.in_features)
        return dequantize_weight(codes, self.weight_scale, self.in_features, dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}"


class PackedEmbedding(nn.Embedding):
    """An embedding in integers, stored as in `PackedLinear`; rows are dequantized as they are looked up.

    Args:
        dtype: Of the rows that come out; the float dtype of the model.
    """

    def __init__(self, *args, scheme: Scheme, dtype: torch.dtype, device: str | torch.device | None = None, **kwargs):
        super().__init__(*args, device=device, **kwargs)
        self.scheme, self.dtype = scheme, dtype
        empty_weight_(self, scheme, device)

    def forward(self, input: Tensor) -> Tensor:
        codes = unpack_codes(self.weight[input].flatten(0, -3), self.scheme.weight_bits, self.embedding_dim)
        rows = dequantize_weight(codes, self.weight_scale[input].flatten(0, -2), self.embedding_dim, self.dtype)
        return rows.view(*input.shape, self.embedding_dim)


def int8_linear(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` on int8 activations and weights, exact integer sums, scaled once at the end.

    Args:
        input: `(..., in_features)`, any float dtype; quantized here with one scale per token.
        weight: `(out_features, 1, in_features)`, int8.
        weight_scale: `(out_features, 1)`, float32.
        bias: `(out_features,)` or None.
    Returns: `(..., out_features)` in the dtype of `input`.
    """
    codes, scale = quantize_tokens(input.reshape(-1, input.shape[-1]))
    product = torch._int_mm(codes, weight.squeeze(1).t()).float()
    product.mul_(scale).mul_(weight_scale.squeeze(1))
    if bias is not None:
        product.add_(bias)
    return product.to(input.dtype).view(*input.shape[:-1], len(weight))


def empty_weight_(layer: nn.Linear | nn.Embedding, scheme: Scheme, device: str | torch.device | None) -> None:
    """Gives a layer packed storage that a checkpoint will fill."""
    out_features, in_features = layer.weight.shape
    groups = scheme.groups(in_features)
    weight = torch.empty(out_features, groups, packed_bytes(scheme, in_features), dtype=torch.int8, device=device)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=torch.float32, device=device))


def pack_weight_(layer: nn.Linear | nn.Embedding, weight: Tensor, scheme: Scheme) -> None:
    """Fills a packed layer with the codes and scales of a float weight."""
    codes, scale = quantize_weight(weight, scheme)
    layer.weight = nn.Parameter(pack_codes(codes, scheme.weight_bits), requires_grad=False)
    layer.weight_scale = scale


def _embedding_arguments(embedding: nn.Embedding) -> dict:
    names = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    return {name: getattr(embedding, name) for name in names}
