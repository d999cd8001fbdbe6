"""What a file says about the model, apart from its tensors and tokenizer: `(key, value)` in the order of the file."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from hf_slim.core.errors import SlimError
from hf_slim.core.host import config_value, field_of, parameter_or_none
from hf_slim.export.gguf.layout import Layout

Metadata = dict[str, Any]
FILE_TYPES = {  # numbers of llama.cpp's `llama_ftype`, for the format of most weights
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q3_K": 11, "Q6_K": 18, "Q2_K": 21, "BF16": 32, "TQ2_0": 37,
}  # fmt: skip
SAME = 1e-6  # relative difference of two frequencies that are the same, computed in float32
MEAN_POOLING = 1


def metadata_of(layout: Layout, forms: Counter[str], name: str) -> Metadata:
    """Sizes, norms, rotary embedding and windows.

    Args:
        forms: Format -> number of values that are written in it.
        name: Of the model, for people.
    Raises: SlimError: for a rotary embedding that llama.cpp does not compute for this architecture.
    """
    form = forms.most_common(1)[0][0]
    found: Metadata = {"general.type": "model", "general.name": name, "general.file_type": FILE_TYPES[form]}
    config: Any = layout.base.config
    own: Metadata = {
        "block_count": len(layout.sizes.heads),
        "context_length": _context_length(config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": _one_or_all(layout, layout.sizes.padded),
        "attention.head_count": _one_or_all(layout, layout.sizes.heads),
        "attention.head_count_kv": _one_or_all(layout, layout.sizes.kv_heads),
    }
    if layout.row.head is None:
        own |= {
            "attention.layer_norm_epsilon": config.layer_norm_eps,
            "attention.causal": False,
            "pooling_type": MEAN_POOLING,
        }
    else:
        own |= {
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "attention.key_length": layout.sizes.head_size,
            "attention.value_length": layout.sizes.head_size,
            "rope.dimension_count": layout.sizes.head_size,
            "vocab_size": layout.base.get_input_embeddings().num_embeddings,
            **_rope(layout, config),
            **layout.row.extra(config),
        }
    return found | {f"{layout.architecture}.{key}": value for key, value in own.items()}


def notes_on(layout: Layout) -> list[str]:
    """What the user should know about the model in this file."""
    notes = []
    window, longest = config_value(layout.base, "sliding_window"), config_value(layout.base, "max_position_embeddings")
    if _context_length(layout.base.config) < longest:
        notes.append(f"The context is {window} tokens, the sliding window, since llama.cpp has no window here.")
    if layout.sizes.added:
        share = layout.sizes.added / sum(layout.sizes.padded)
        notes.append(
            f"{layout.sizes.added} zero neurons ({share:.1%} of all) were added, so that rows are whole blocks"
            + (" and all layers have one width" if not layout.row.varying else "")
            + ". They change nothing. Prune with `round_to: 32`"
            + (" and `uniform: true`" if not layout.row.varying else "")
            + " to need none."
        )
    if layout.row.head is None:
        notes.append("Token vectors are pooled to their mean; llama.cpp's `--pooling` chooses another way.")
    return notes


def rope_factors(layout: Layout) -> Tensor | None:
    """What every frequency of the rotary embedding is divided by, float32 `(head_size / 2,)`; None where by nothing.

    Raises: SlimError: if attention is scaled too (`yarn`, `longrope`).
    """
    rotary = parameter_or_none(layout.base, "rotary_emb")
    if rotary is None:
        return None
    buffers = dict(rotary.named_buffers())
    kind = "" if "inv_freq" in buffers else "full_attention_"  # gemma3 has another one for layers with a window
    if f"{kind}inv_freq" not in buffers:
        return None
    used = buffers[f"{kind}inv_freq"].cpu()
    if field_of(rotary, f"{kind}attention_scaling", 1.0) != 1.0:
        raise SlimError("The rotary embedding scales attention (yarn, longrope), which this exporter does not write.")
    exponents = torch.arange(0, layout.sizes.head_size, 2, dtype=torch.float32) / layout.sizes.head_size
    factors = _theta(layout.base.config) ** -exponents / used.float()
    return None if (factors - 1).abs().max() < max(SAME, torch.finfo(used.dtype).eps) else factors


def _rope(layout: Layout, config: Any) -> Metadata:
    found: Metadata = {"rope.freq_base": float(_theta(config))}
    factors = rope_factors(layout)
    if factors is None or layout.row.rope_factors:
        return found
    if (factors / factors[0] - 1).abs().max() < SAME:  # all alike: positions are divided
        return found | {"rope.scaling.type": "linear", "rope.scaling.factor": float(factors[0])}
    raise SlimError(
        f"The rotary embedding is scaled by frequency, and llama.cpp does not do that for '{layout.row.name}'. Only "
        "linear scaling can be written."
    )


def _theta(config: Any) -> float:
    parameters = config.rope_parameters
    return float(parameters.get("full_attention", parameters)["rope_theta"])


def _context_length(config: Any) -> int:
    """Tokens within which llama.cpp computes what the model does: up to the window where all layers have one."""
    window = field_of(config, "sliding_window")
    everywhere = field_of(config, "layer_types") is None or "full_attention" not in config.layer_types
    has_own = config.model_type == "gemma3_text"
    longest = int(config.max_position_embeddings)
    return min(window, longest) if window and everywhere and not has_own else longest


def _one_or_all(layout: Layout, sizes: tuple[int, ...]) -> int | list[int]:
    return list(sizes) if layout.architecture != layout.row.name else sizes[0]


def add_to(writer: Any, metadata: Metadata) -> None:
    """Writes metadata with a `gguf.GGUFWriter`; lists of strings, whole numbers or floats become arrays."""
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
