"""Tiny random models of every family that pruning promises, and what each of them has to lose."""

import random
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_slim.pruning.config import KINDS
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.removal.cut import Removed
from hf_slim.pruning.structure.example_inputs import example_inputs
from tests.tiny import with_random_biases

TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
GROUPED = TOKENS | SIZES | {"num_key_value_heads": 3}
ENCODER = {"vocab_size": 96} | SIZES
GPT = TOKENS | {"n_embd": 48, "n_layer": 2, "n_head": 6}
MIXTURE = GROUPED | {"num_experts_per_tok": 2}
QWEN_MIXTURE = MIXTURE | {"num_experts": 4, "moe_intermediate_size": 32}
SHARED_EXPERT = {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
DISTILBERT = {"vocab_size": 96, "dim": 48, "hidden_dim": 64, "n_layers": 2, "n_heads": 6}
FALCON = TOKENS | {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
T5 = {"vocab_size": 96, "d_model": 48, "d_kv": 8, "num_heads": 6, "d_ff": 64, "num_layers": 2, "dropout_rate": 0.0}
WHISPER = {
    "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8, "max_source_positions": 10,
    "max_target_positions": 20, "decoder_start_token_id": 1,
}  # fmt: skip
T5_GROUPS = {"ffn": 4, "kv_heads": 3, "layers": 2, "attention_blocks": 0, "ffn_blocks": 2}
GATED = {"feed_forward_proj": "gated-gelu"}
WAV2VEC2 = SIZES | {
    "vocab_size": 32, "conv_dim": [16, 16, 16], "conv_stride": [5, 4, 2], "conv_kernel": [10, 8, 4],
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
PICTURE = {"image_size": 16, "patch_size": 8}


@dataclass(frozen=True)
class Family:
    """A model class with a tiny config, and how many group sets of each kind it has."""

    model: str
    config: dict
    ffn: int = 2
    kv_heads: int = 2
    heads: int = 0  # query heads that can go one by one
    channels: int = 0
    layers: int = 1  # stacks of which whole layers can go
    attention_blocks: int = 1  # stacks of which the attention of single layers can go
    ffn_blocks: int = 1
    experts: int = 0
    hidden: int = 1
    partly: str = ""  # the kind of which some sets are refused

    def build(self, seed: int = 0, **changes: object) -> PreTrainedModel:
        torch.manual_seed(seed)
        model_class = getattr(transformers, self.model)
        model = model_class(model_class.config_class(**(self.config | changes)))
        return with_random_biases(model).eval()


FAMILIES = {
    "llama": Family("LlamaForCausalLM", GROUPED, heads=2),
    "mistral": Family("MistralForCausalLM", GROUPED, heads=2),
    "qwen2": Family("Qwen2ForCausalLM", GROUPED, heads=2),
    "qwen3": Family("Qwen3ForCausalLM", GROUPED | {"head_dim": 8}, heads=2),
    "gemma2": Family("Gemma2ForCausalLM", GROUPED | {"head_dim": 8}, heads=2),
    "gemma3": Family("Gemma3ForCausalLM", GROUPED | {"head_dim": 8}, heads=2),
    "phi3": Family("Phi3ForCausalLM", GROUPED, heads=2),
    "gpt2": Family("GPT2LMHeadModel", GPT, attention_blocks=0, ffn_blocks=0),
    "gpt_neox": Family("GPTNeoXForCausalLM", TOKENS | SIZES),
    "opt": Family("OPTForCausalLM", TOKENS | SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 48}, attention_blocks=0),
    "falcon": Family(
        "FalconForCausalLM", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 3}, heads=2,
        attention_blocks=0,
    ),
    "falcon_one_kv_head": Family("FalconForCausalLM", FALCON | {"multi_query": True}, kv_heads=0, heads=2),
    "bert": Family("BertForSequenceClassification", ENCODER),
    "roberta": Family("RobertaForSequenceClassification", ENCODER),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        DISTILBERT,
    ),
    "t5": Family("T5ForConditionalGeneration", T5, **T5_GROUPS),
    "t5_gated": Family("T5ForConditionalGeneration", T5 | GATED, **T5_GROUPS),
    "vit": Family("ViTForImageClassification", SIZES | PICTURE),
    "whisper": Family("WhisperForConditionalGeneration", TOKENS | WHISPER, ffn=4, kv_heads=6, channels=1, layers=2,
        attention_blocks=0, ffn_blocks=2),
    "mixtral": Family("MixtralForCausalLM", MIXTURE | {"num_local_experts": 4}, heads=2, experts=2, ffn_blocks=0),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        QWEN_MIXTURE | SHARED_EXPERT, ffn=4, heads=2, experts=2,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        QWEN_MIXTURE | {"head_dim": 8}, heads=2, experts=2, ffn_blocks=0,
    ),
    # what nothing in hf_slim was written for
    "albert": Family("AlbertForSequenceClassification", ENCODER | {"embedding_size": 24}, ffn=1, kv_heads=1, layers=0,
        attention_blocks=0, ffn_blocks=0, hidden=2),
    "bart": Family(
        "BartForConditionalGeneration",
        TOKENS | {**WHISPER, "max_position_embeddings": 64}, ffn=4, kv_heads=6,
        layers=2, attention_blocks=3, ffn_blocks=2,
    ),
    "clip": Family("CLIPVisionModel", SIZES | PICTURE, hidden=0),
    "deberta": Family("DebertaV2ForSequenceClassification", ENCODER, attention_blocks=0),
    "gptj": Family("GPTJForCausalLM", GPT | {"rotary_dim": 4}),
    "modernbert": Family(
        "ModernBertForSequenceClassification",
        TOKENS | SIZES | {"cls_token_id": 1, "sep_token_id": 2},
    ),
    "wav2vec2": Family("Wav2Vec2ForCTC", WAV2VEC2, channels=1, hidden=0, partly="channels"),
    "smollm3": Family("SmolLM3ForCausalLM", GROUPED, heads=2),
    "resnet": Family(
        "ResNetForImageClassification",
        RESNET, ffn=0, kv_heads=0, channels=4,
        layers=0, attention_blocks=0, ffn_blocks=0, hidden=0,
    ),
}  # fmt: skip

# kind -> the families of which no group can go; everything else must lose some in the matrix
UNSUPPORTED = {
    "ffn": {"resnet"},
    "kv_heads": {"falcon_one_kv_head", "resnet"},
    "heads": {  # query heads go one by one only where several share a key-value head
        "gpt2", "gpt_neox", "opt", "bert", "roberta", "distilbert", "t5", "t5_gated", "vit", "whisper", "albert",
        "bart", "clip", "deberta", "gptj", "modernbert", "wav2vec2", "resnet",
    },
    "channels": {*FAMILIES} - {"whisper", "wav2vec2", "resnet"},
    "layers": {"albert", "resnet"},
    "attention_blocks": {
        "gpt2", "opt", "falcon", "t5", "t5_gated", "whisper", "albert", "deberta", "resnet",
    },
    "ffn_blocks": {"gpt2", "mixtral", "qwen3_moe", "albert", "resnet"},
    "experts": {*FAMILIES} - {"mixtral", "qwen2_moe", "qwen3_moe"},
    "hidden": {"clip", "wav2vec2", "resnet"},
}  # fmt: skip
EAGER_ONLY = {"gemma2", "deberta", "gptj", "resnet"}  # those whose default is not sdpa: it is not theirs


def supported(name: str) -> tuple[str, ...]:
    """The kinds of which a family can lose groups."""
    return tuple(kind for kind in KINDS if name not in UNSUPPORTED[kind])


LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
NEURONS = (
    "intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"
)  # fmt: skip
HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"
)  # fmt: skip


def random_sizes(config: dict, seed: int, kinds: tuple[str, ...] = ()) -> dict[str, int]:
    """Other numbers of layers, neurons and heads for a config, such as its class accepts and `kinds` need."""
    draw = random.Random(seed)
    heads = [(3, 2), (2, 2), (2, 3), (4, 1), (3, 4), (6, 1), (2, 4)]
    kv_heads, per_group = draw.choice([pair for pair in heads if "heads" not in kinds or pair[1] > 1])
    sizes = {name: draw.choice([2, 3]) for name in LAYERS}
    sizes |= {name: draw.choice([40, 56, 64, 72]) for name in NEURONS}
    sizes |= dict.fromkeys(HEADS, kv_heads * per_group)
    sizes |= {"num_key_value_heads": kv_heads, "num_kv_heads": kv_heads}
    return {name: size for name, size in sizes.items() if name in config}


def random_groups(group_sets: list[GroupSet], seed: int) -> Removed:
    """About half of the groups of every set, as its `balance`, `multiple`, `keep` and `pinned` allow.

    At least one group of every kind that can lose one: the first set of a kind that can does.
    """
    generator = torch.Generator().manual_seed(seed)
    removed, losing = {}, set()
    for group_set in group_sets:
        order = torch.rand(group_set.count, generator=generator)
        free = group_set.count - max(group_set.keep, len(group_set.pinned))
        most = group_set.balance - 1 if group_set.balance else free // group_set.multiple
        if most < 1:
            continue
        least = int(group_set.kind not in losing)
        steps = int(torch.randint(least, most + 1, (), generator=generator))
        if group_set.balance:
            firsts = torch.arange(0, group_set.count, group_set.balance).unsqueeze(1)
            chosen = order.view(-1, group_set.balance).argsort(1)[:, :steps] + firsts
        else:
            order[list(group_set.pinned)] = 2.0
            chosen = order.argsort()[: steps * group_set.multiple]
        if chosen.numel():
            removed[group_set.name] = sorted(chosen.flatten().tolist())
            losing.add(group_set.kind)
    return removed


def inputs_for(model: PreTrainedModel) -> dict[str, Tensor]:
    return example_inputs(model)


@torch.no_grad()
def output(model: PreTrainedModel) -> Tensor:
    """What a model of any family says about one and the same input."""
    torch.manual_seed(1)
    made = model.eval()(**inputs_for(model))
    return made.logits if hasattr(made, "logits") else made[0]
