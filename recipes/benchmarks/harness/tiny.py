"""Stand-ins for the models and data of a benchmark, for `--smoke`: random weights, made-up texts, on disk."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.inputs import Inputs
from hf_slim.data import DataConfig

WORDS = [f"word{number}" for number in range(90)]
SPECIAL = ("<pad>", "<end>", "[CLS]", "[SEP]", "[UNK]")
BLOCK_SIZE = 64


def inputs(folder: Path) -> Inputs:
    """Tiny models and texts, saved below `folder`."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 8, "vocab_size": len(WORDS) + len(SPECIAL)}
    causal = LlamaConfig(
        hidden_size=192, intermediate_size=256, num_attention_heads=6, num_key_value_heads=3,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        **sizes,
    )  # fmt: skip
    encoder = BertConfig(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, max_position_embeddings=512, **sizes
    )
    LlamaForCausalLM(causal).save_pretrained(folder / "causal")
    BertModel(encoder).save_pretrained(folder / "encoder")
    for name in ("causal", "encoder"):
        _tokenizer(with_classes=name == "encoder").save_pretrained(folder / name)
    source = _write_rows(folder / "texts.jsonl", [{"text": _text(seed, 200)} for seed in range(40)])
    return Inputs(str(folder / "causal"), str(folder / "encoder"), DataConfig(str(source), block_size=BLOCK_SIZE))


def save_data(folder: Path) -> Path:
    """The data sets that benchmarks read from `$HF_SLIM_DATA`, with a few made-up rows each."""
    for name, column, splits, classes in (
        ("sst2", "sentence", ("train", "validation"), 2),
        ("banking77", "text", ("train", "test"), 4),
        ("tinystories", "text", ("train", "validation"), 0),
    ):
        for split in splits:
            rows = [{column: _text(seed, 8 if classes else 400)} | ({"label": seed % classes} if classes else {})
                    for seed in range(64)]  # fmt: skip
            _write_rows(folder / name / f"{split}.jsonl", rows)
    return folder


def _tokenizer(with_classes: bool) -> PreTrainedTokenizerFast:
    """One token per word; with `with_classes` a text begins with [CLS] and ends with [SEP], as an encoder's does."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if with_classes:
        inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    )  # fmt: skip


def _text(seed: int, n_words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def _write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
