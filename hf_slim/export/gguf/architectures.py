"""The architectures of GGUF that models are written as: one row of data for each `model_type` of transformers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

OUTER = {"embed_tokens": "token_embd", "norm": "output_norm"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
PHI3_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
BERT_OUTER = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
BERT_INNER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
GEMMA_PERIOD, GEMMA_THETA = (
    6,
    10_000.0,
)  # written into llama.cpp: every sixth layer sees all tokens; others turn by this
SMOLLM3_PERIOD = 4  # every fourth layer has no rotary embedding


def _no_mismatch(config: Any) -> str:
    return ""


def _no_keys(config: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """How models of one `model_type` are written.

    Attributes:
        name: Of the architecture, as llama.cpp knows it.
        outer: Module in the base model -> name of its tensors.
        inner: Module in a layer -> name of its tensors behind "blk.<number>.".
        layers: The list of layers in the base model.
        head: The output head in the model -> name of its tensors; None: encoders have none.
        rotated: Modules whose rows llama.cpp wants in another order, since it rotates neighbouring rows of a head.
        norm_offset: What is added to the weights of norms, which the model adds when it computes.
        varying: The architecture that takes another number of heads and neurons for every layer; "": there is none.
        square: Whether heads times their size must be the width of the residual stream.
        fused_gate: Whether one matrix makes gate and neurons, the rows of the gate first.
        rope_factors: Whether llama.cpp reads a factor for every frequency of the rotary embedding.
        float32: Tensors that llama.cpp adds as they are, and that must be float32.
        left_out: Beginnings of parameters of the base model that llama.cpp does not use.
        activation: The activation function of the feed-forward layers.
        mismatch: What in a config llama.cpp computes otherwise, with what to do; "": nothing.
        extra: Keys of metadata that only this architecture has.
    """

    name: str
    outer: dict[str, str] = field(default_factory=lambda: OUTER)
    inner: dict[str, str] = field(default_factory=lambda: INNER)
    layers: str = "layers"
    head: tuple[str, str] | None = ("lm_head", "output")
    rotated: tuple[str, ...] = ()
    norm_offset: float = 0.0
    varying: str = ""
    square: bool = False
    fused_gate: bool = False
    rope_factors: bool = False
    float32: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    activation: str = "silu"
    mismatch: Callable[[Any], str] = _no_mismatch
    extra: Callable[[Any], dict[str, Any]] = _no_keys

    def module_of(self, tensor: str) -> str:
        """The module in a layer whose tensors have this name; "" if there is none."""
        return next((module for module, name in self.inner.items() if name == tensor), "")


def _window(config: Any) -> str:
    if all(kind == "full_attention" for kind in config.layer_types):
        return ""
    return "Some layers have a sliding window, which llama.cpp leaves out here. Set `use_sliding_window` to false."


def _gemma3(config: Any) -> str:
    count, size = config.num_hidden_layers, config.head_dim
    expected = [index % GEMMA_PERIOD == GEMMA_PERIOD - 1 for index in range(count)]
    if [kind == "full_attention" for kind in config.layer_types] != expected:
        return (
            f"llama.cpp gives all layers but every {GEMMA_PERIOD}th a sliding window, and here other layers have one, "
            "as after whole layers were removed. Prune neurons or heads instead."
        )
    if config.rope_parameters["sliding_attention"] != {"rope_type": "default", "rope_theta": GEMMA_THETA}:
        return f"llama.cpp rotates layers with a window with theta {GEMMA_THETA}, unscaled, and here it is otherwise."
    if count == 62:  # of the 27B model, which llama.cpp knows by its number of layers
        size = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != size:
        return f"llama.cpp divides attention by the root of {size}, and here it is {config.query_pre_attn_scalar}."
    return "" if config.attn_logit_softcapping is None else "llama.cpp has no `attn_logit_softcapping` here."


def _gemma3_keys(config: Any) -> dict[str, Any]:
    cap = config.final_logit_softcapping
    return {"attention.sliding_window": config.sliding_window} | (
        {} if cap is None else {"final_logit_softcapping": float(cap)}
    )


def _smollm3(config: Any) -> str:
    if config.no_rope_layers != [int((index + 1) % SMOLLM3_PERIOD != 0) for index in range(config.num_hidden_layers)]:
        return (
            f"llama.cpp leaves the rotary embedding out of every {SMOLLM3_PERIOD}th layer, and here the layers differ "
            "from that, as they do after whole layers were removed. Prune neurons or heads instead."
        )
    return _window(config)


def _phi3(config: Any) -> str:
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "Only part of each head is rotated (`partial_rotary_factor`), which this exporter does not write."
    return ""


def _phi3_keys(config: Any) -> dict[str, Any]:
    # without a window llama.cpp takes that of the published models
    return {"attention.sliding_window": 0, "rope.scaling.original_context_length": config.max_position_embeddings}


_LLAMA: dict[str, Any] = {
    "rotated": ("self_attn.q_proj", "self_attn.k_proj"), "varying": "deci", "rope_factors": True,
}  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", **_LLAMA),
    "mistral": Architecture("llama", **_LLAMA),
    "smollm3": Architecture("smollm3", rotated=_LLAMA["rotated"], mismatch=_smollm3),
    "qwen2": Architecture("qwen2", square=True, mismatch=_window),
    "qwen3": Architecture("qwen3", inner=INNER | QK_NORMS, mismatch=_window),
    "gemma3_text": Architecture(
        "gemma3", inner=INNER | QK_NORMS | GEMMA_NORMS, norm_offset=1.0, activation="gelu_pytorch_tanh",
        mismatch=_gemma3, extra=_gemma3_keys,
    ),
    "phi3": Architecture(
        "phi3", inner=PHI3_INNER, square=True, fused_gate=True, mismatch=_phi3, extra=_phi3_keys,
    ),
    "bert": Architecture(
        "bert", BERT_OUTER, BERT_INNER, "encoder.layer", head=None, square=True, activation="gelu",
        float32=("position_embd", "token_types"), left_out=("pooler.",),
    ),
}  # fmt: skip
