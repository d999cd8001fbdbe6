"""Tiny models of the architectures that are exported, with sizes that quantized blocks need, and tokenizers."""

from collections.abc import Callable

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from hf_slim import PruningConfig, QuantizationConfig, convert, prepare

VOCAB_SIZE = 320
SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
HEADS = {"head_dim": 32}


def _made(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose norms and biases are not what they are at the start, which would hide that one is lost."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def llama(**changes: object) -> PreTrainedModel:
    return _made(LlamaForCausalLM(LlamaConfig(**(SIZES | HEADS | changes))))


def mistral(**changes: object) -> PreTrainedModel:
    return _made(MistralForCausalLM(MistralConfig(**(SIZES | HEADS | {"sliding_window": None} | changes))))


def qwen2(**changes: object) -> PreTrainedModel:
    return _made(Qwen2ForCausalLM(Qwen2Config(**(SIZES | changes))))


def qwen3(**changes: object) -> PreTrainedModel:
    return _made(Qwen3ForCausalLM(Qwen3Config(**(SIZES | {"head_dim": 128} | changes))))


def gemma3(**changes: object) -> PreTrainedModel:
    own = {"head_dim": 256, "sliding_window": 32, "num_hidden_layers": 6}  # transformers reads no other size of heads
    return _made(Gemma3ForCausalLM(Gemma3TextConfig(**(SIZES | own | changes))))


def phi3(**changes: object) -> PreTrainedModel:
    return _made(Phi3ForCausalLM(Phi3Config(**(SIZES | {"original_max_position_embeddings": 128} | changes))))


def smollm3(**changes: object) -> PreTrainedModel:
    return _made(SmolLM3ForCausalLM(SmolLM3Config(**(SIZES | changes))))


def bert(**changes: object) -> PreTrainedModel:
    sizes = {key: value for key, value in SIZES.items() if "key_value" not in key and "tie" not in key}
    return _made(BertModel(BertConfig(**(sizes | changes)), add_pooling_layer=False))


DECODERS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "gemma3": gemma3, "phi3": phi3,
    "smollm3": smollm3,
}  # fmt: skip


def packed(model: PreTrainedModel, scheme: str, embeddings: str | None = None) -> PreTrainedModel:
    return convert(prepare(model, QuantizationConfig(scheme=scheme, embeddings=embeddings))).eval()


def pruned(
    model: PreTrainedModel, sparsity: dict[str, float], scheme: str = "float", uniform: bool = False
) -> PreTrainedModel:
    """A model without some of its groups, other numbers in every layer unless `uniform`, and packed by a scheme."""
    grids = [] if scheme == "float" else [QuantizationConfig(scheme=scheme, embeddings=None)]
    return convert(prepare(model, PruningConfig(sparsity=sparsity, uniform=uniform, criterion="l1"), *grids)).eval()


def tokens(rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(3, 250, (rows, length))


def byte_level(split: str | None = None, size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges; `split` is a regular expression, or None for that of GPT-2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("o", "n")]
    pieces = ["<s>", "</s>", "<pad>", *alphabet, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces[:size])}, merges=merges))
    if split is None:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        cut = pre_tokenizers.Split(Regex(split), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_only])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<pad>")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def sentencepiece(prepend: bool = True) -> PreTrainedTokenizerFast:
    """BPE over characters with bytes for those it lacks, as sentencepiece makes it."""
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("o", "n"), ("a", "t"), ("▁", "a")]
    characters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    pieces += ["".join(pair) for pair in merges]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prepend else []
    inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    inner.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_pieces(lowercase: bool = True) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "sat", "##s", "cat", "##er", ".", "mat"]
    vocabulary = {word: i for i, word in enumerate(words)}
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=lowercase)
