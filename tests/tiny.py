"""Tiny random models, data and trainers: everything a test needs, offline and in milliseconds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_slim import DistillationConfig, PruningConfig, QuantizationConfig
from hf_slim.quantization.kernels import cpu as kernels

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


def gpt2(seed: int = 0, **changes: object) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return with_random_biases(GPT2LMHeadModel(GPT2Config(**(sizes | changes))))


def t5(seed: int = 0, **changes: object) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB_SIZE, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(
        T5Config(**(sizes | {"dropout_rate": 0.0, "decoder_start_token_id": 0} | changes))
    )


def vit(seed: int = 0, **changes: object) -> ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    image = {"image_size": 16, "patch_size": 8, "num_channels": 3, "num_labels": 3}
    return with_random_biases(ViTForImageClassification(ViTConfig(**(sizes | image | changes))))


def mixtral(seed: int = 0, **changes: object) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": VOCAB_SIZE}
    return MixtralForCausalLM(MixtralConfig(**(sizes | experts | changes)))


def cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    convolutions = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, groups=2), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16 * 7 * 7, 10)).eval()


def with_random_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Fresh biases are zero, which would hide a bias that is lost."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


FAMILIES = {"llama": llama, "qwen3": qwen3, "bert": bert, "bert_mlm": bert_mlm}
ALL_FAMILIES = FAMILIES | {"gpt2": gpt2, "t5": t5, "vit": vit, "mixtral": mixtral, "cnn": cnn}


def only_reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed layers compute through their float copies, as they did when they were trained."""
    reference = [kernel for kernel in kernels.KERNELS if kernel.name == "dequantize"]
    monkeypatch.setattr(kernels, "KERNELS", reference)


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


class EveryStep(TrainerCallback):
    """Does something with the model after every step, in the mode that it likes."""

    def __init__(self, action: Callable[[nn.Module], object]):
        self.action = action

    def on_step_end(self, args, state, control, model, **kwargs):
        self.action(model)
        model.train()


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    """What a model of any family says about inputs that suit it."""
    model.eval()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if not isinstance(model, PreTrainedModel) or model.main_input_name == "pixel_values":
        image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        return model(image) if isinstance(model, nn.Sequential) else model(pixel_values=image).logits
    more = {"decoder_input_ids": tokens(seed=1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=tokens(), **more).logits


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
