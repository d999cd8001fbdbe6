"""Tiny random models, data and trainers: everything a test needs, offline and in milliseconds."""

from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_slim import DistillationConfig, PruningConfig, QuantizationConfig

VOCAB_SIZE = 96
LLAMA = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
BERT = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip

PRUNING = PruningConfig(sparsity={"ffn": 0.25, "kv_heads": 0.34}, uniform={"kv_heads": False}, start=0.0)
QUANTIZATION = QuantizationConfig(scheme="w8a8", embeddings="w8a8")
DISTILLATION = DistillationConfig(alpha=0.5, temperature=2.0)


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(LLAMA | {"tie_word_embeddings": True} | changes)))


def qwen3(seed: int = 0, **changes: object) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**(LLAMA | {"tie_word_embeddings": False} | changes)))


def bert(seed: int = 0, **changes: object) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return with_random_biases(BertForSequenceClassification(BertConfig(**(BERT | changes))))


def bert_mlm(seed: int = 0, **changes: object) -> BertForMaskedLM:
    torch.manual_seed(seed)
    return with_random_biases(BertForMaskedLM(BertConfig(**(BERT | changes))))


def with_random_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Fresh biases are zero, which would hide a bias that is lost."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


FAMILIES = {"llama": llama, "qwen3": qwen3, "bert": bert, "bert_mlm": bert_mlm}


def tokens(rows: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def text_data(rows: int = 32, length: int = 12, ragged: bool = False) -> Dataset:
    """Token sequences whose labels are themselves; ragged ones ignore a different number of labels each."""
    ids = tokens(rows, length)
    labels = ids.clone()
    if ragged:
        for row in range(rows):
            labels[row, : 1 + row % (length - 2)] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def class_data(rows: int = 32, length: int = 12) -> Dataset:
    ids = tokens(rows, length)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids.sum(1) % 3).tolist()})


def data_for(model: PreTrainedModel) -> Dataset:
    return class_data() if isinstance(model, BertForSequenceClassification) else text_data()


def trainer(
    model: PreTrainedModel, folder: Path, callbacks: list, data: Dataset | None = None, **changes: object
) -> Trainer:
    settings = {
        "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "save_strategy": "no",
        "logging_steps": 2, "disable_tqdm": True, "use_cpu": True, "seed": 0,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **(settings | changes))
    data = data or data_for(model)
    return Trainer(model, args, train_dataset=data, eval_dataset=data.select(range(4)), callbacks=callbacks)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    model.eval()
    return model(input_ids=tokens() if ids is None else ids).logits


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of printable text; id 0 ends a text."""
    vocabulary = {chr(code): code - 31 for code in range(32, 126)} | {"<end>": 0}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<end>")


def save_base(folder: Path) -> Path:
    """A tiny Llama with its tokenizer, as a user would have it on disk."""
    llama(vocab_size=VOCAB_SIZE).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
