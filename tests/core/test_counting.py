import random

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GptOssConfig, GptOssForCausalLM

from hf_slim import PruningConfig, QuantizationConfig, convert, prepare
from hf_slim.core.counting import count_multiply_adds
from hf_slim.evaluation.footprint import attention_multiply_adds_per_token, counting_unit, multiply_adds_per_token
from hf_slim.pruning.budget.savings import counted as budget
from tests import tiny
from tests.families import FAMILIES, MIXTURE, example_inputs, random_sizes

OTHERS = ("vit", "clip", "whisper", "wav2vec2", "resnet")  # they read pictures and sounds
TEXT = [name for name in FAMILIES if name not in OTHERS]
FUSED = ("falcon",)  # its attention is fused, and torch's counter does not see that on the CPU
SWITCHABLE = ("llama", "gpt2", "bert", "mixtral", "gemma3", "phi3", "modernbert", "opt")


@torch.no_grad()
def reference(model, inputs):
    """Multiply-adds as torch counts them, operator by operator: one is two FLOPs."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def in_plain_products(model):
    """The model with attention and experts computed as plain products of matrices, which torch's counter sees."""
    if type(model).__name__ != "FalconForCausalLM":
        model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    return model


def built(name, seed):
    """A model of random sizes."""
    family = FAMILIES[name]
    return in_plain_products(family.build(seed, **random_sizes(family.config, seed)))


def counted(model, inputs, per_token):
    return count_multiply_adds(model, lambda: model(**inputs), per_token)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FUSED])
def test_weights_and_attention_are_what_torch_counts(name, seed):
    model = built(name, seed)
    inputs = example_inputs(model)
    found = counted(model, inputs, per_token=False)
    assert sum(found.weights.values()) + found.attention == reference(model, inputs)


@pytest.mark.parametrize("name", TEXT)
def test_per_token_is_what_torch_counts_for_one_token_whatever_the_length(name):
    model = built(name, 1)
    attention = 0 if name in FUSED else counted(model, example_inputs(model, 2), per_token=True).attention // 4
    one_token = reference(model, example_inputs(model, 1)) - attention
    assert multiply_adds_per_token(model) == one_token
    assert counting_unit(model) == "token"
    for length in (1, 3, 7):
        found = sum(counted(model, example_inputs(model, length), per_token=True).weights.values())
        assert found == one_token


@pytest.mark.parametrize("name", OTHERS)
def test_pictures_and_sounds_are_counted_per_example(name):
    model = built(name, 1)
    inputs = example_inputs(model, 1)
    assert multiply_adds_per_token(model) == sum(counted(model, inputs, per_token=False).weights.values())
    assert counting_unit(model) == "example"


@pytest.mark.parametrize("name", SWITCHABLE)
def test_attention_is_what_torch_no_longer_counts_once_it_is_fused(name):
    model, length = built(name, 3), 8
    inputs = example_inputs(model, length)
    in_plain_products = reference(model, inputs)
    found = counted(model, inputs, per_token=True).attention
    assert attention_multiply_adds_per_token(model, length) == found / length > 0
    model.set_attn_implementation("sdpa")
    assert in_plain_products - reference(model, inputs) == found
    assert counted(model, inputs, per_token=True).attention == found


@pytest.mark.parametrize("length", [2, 9])
def test_a_llama_by_hand(length):
    layers, hidden, neurons, heads, kv_heads, width, vocabulary = 3, 48, 64, 6, 3, 8, 96  # those of tiny.llama
    attention = hidden * width * (2 * heads + 2 * kv_heads)  # q, k, v, o
    by_hand = layers * (attention + 3 * hidden * neurons) + hidden * vocabulary
    for tied in (True, False):  # a head that shares the embedding's weights multiplies as one of its own
        assert multiply_adds_per_token(tiny.llama(tie_word_embeddings=tied)) == by_hand
    assert attention_multiply_adds_per_token(tiny.llama(), length) == layers * heads * 2 * width * length


def test_a_mixture_by_hand():
    model = (
        tiny.mixtral()
    )  # hidden 32, 48 neurons, 2 layers, 4 heads of 8, 2 key-value heads, 2 of 4 experts, 96 tokens
    per_layer = 32 * 8 * (2 * 4 + 2 * 2) + 32 * 4 + 2 * 3 * 32 * 48
    assert multiply_adds_per_token(model) == 2 * per_layer + 32 * 96


def test_half_of_the_experts_neurons_are_half_of_what_experts_count():
    model = tiny.mixtral(intermediate_size=64)
    before = multiply_adds_per_token(model)
    convert(prepare(model, PruningConfig({"ffn": 0.5}, criterion="l1")))
    assert before - multiply_adds_per_token(model) == 2 * 2 * 3 * 32 * 32  # layers, experts visited, matrices, sizes


def test_experts_that_no_token_visits_are_free():
    few, many = (tiny.mixtral(num_local_experts=count) for count in (4, 8))
    routers = 2 * 32 * 4  # layers, hidden width, experts more
    assert multiply_adds_per_token(many) - multiply_adds_per_token(few) == routers
    more = tiny.mixtral(num_experts_per_tok=3)
    assert multiply_adds_per_token(more) - multiply_adds_per_token(few) == 2 * 3 * 32 * 48


def test_fused_experts_with_inputs_before_outputs():
    sizes = MIXTURE | {"num_local_experts": 4, "intermediate_size": 56, "head_dim": 8}
    model = GptOssForCausalLM(
        GptOssConfig(**sizes, experts_implementation="eager", attn_implementation="eager")
    ).eval()
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 48, 2 * 56)
    inputs = example_inputs(model)
    found = counted(model, inputs, per_token=False)
    assert sum(found.weights.values()) + found.attention == reference(model, inputs)


@pytest.mark.parametrize("family", list(tiny.ALL_FAMILIES))
def test_fake_quantized_and_packed_layers_count_as_their_float_forms(family):
    model = tiny.ALL_FAMILIES[family]()
    if family == "cnn":
        model.dummy_inputs = {"input": torch.rand(1, 3, 16, 16)}
    before = multiply_adds_per_token(model)
    attention = attention_multiply_adds_per_token(model, 6)
    for change in (lambda model: prepare(model, QuantizationConfig("w8a8", embeddings="w8a8")), convert):
        change(model)
        assert multiply_adds_per_token(model) == before
        assert attention_multiply_adds_per_token(model, 6) == attention


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5", "whisper", "qwen2_moe", "resnet"])
def test_a_pruned_model_counts_what_torch_counts(name):
    model = in_plain_products(FAMILIES[name].build())
    before = multiply_adds_per_token(model)
    kinds = {"channels": 0.5} if name == "resnet" else {"ffn": 0.5, "kv_heads": 0.34}
    convert(prepare(model, PruningConfig(kinds, criterion="l1")))
    inputs = example_inputs(model)
    found = counted(model, inputs, per_token=False)
    assert sum(found.weights.values()) + found.attention == reference(model, inputs)
    assert multiply_adds_per_token(model) < before


def test_adapters_count_beside_their_layer_until_they_are_merged():
    peft = pytest.importorskip("peft", reason="adapters are PEFT's: pip install peft")
    model, before = tiny.llama(), multiply_adds_per_token(tiny.llama())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert multiply_adds_per_token(model) - before == 3 * 4 * (48 + 48)  # layers, rank, both sizes of q_proj
    with adapted.disable_adapter():
        assert multiply_adds_per_token(model) == before
    assert multiply_adds_per_token(adapted.merge_and_unload()) == before


def test_layers_count_as_often_as_they_run():
    once, thrice = (FAMILIES["albert"].build(num_hidden_layers=count) for count in (1, 3))
    layer = sum(size for path, size in budget(once, "macs").items() if "albert_layers" in path)
    assert multiply_adds_per_token(thrice) - multiply_adds_per_token(once) == 2 * layer


@pytest.mark.parametrize("seed", range(6))
def test_convolutions_count_every_place_of_their_output(seed):
    draw = random.Random(seed)
    dims = 1 + seed % 3
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    groups, stride, padding = draw.choice([1, 2, 4]), draw.choice([1, 2]), draw.choice([0, 1])
    settings = {"stride": stride, "padding": padding, "groups": groups}
    model = nn.Sequential(plain(4, 8, draw.choice([2, 3]), **settings), nn.ReLU(), transposed(8, 4, 3, **settings))
    inputs = {"input": torch.rand(1, 4, *(draw.choice([7, 8, 9]) for _ in range(dims)))}
    found = counted(model, inputs, per_token=False)
    assert sum(found.weights.values()) == reference(model, inputs)
    assert set(found.weights) == {"0.weight", "2.weight"}


class UsesWeightsItself(nn.Module):
    """Products outside layers: torch's attention, a matrix in half precision, an embedding as a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.router = nn.Parameter(torch.rand(5, 8, dtype=torch.bfloat16))
        self.query = nn.Parameter(torch.rand(1, 1, 8))

    def forward(self, ids):
        states = self.embedding(ids)
        pooled, _ = self.attention(self.query, states, states)
        routed = nn.functional.linear(states, self.router.float())
        return nn.functional.linear(states, self.embedding.weight), pooled, routed


def test_weights_that_a_module_multiplies_by_itself_are_counted_under_their_names():
    model, length = UsesWeightsItself().eval(), 6
    inputs = {"ids": torch.randint(20, (1, length))}
    found = counted(model, inputs, per_token=False)
    assert found.weights == {
        "embedding.weight": length * 8 * 20, "router": length * 8 * 5,
        "attention.in_proj_weight": 8 * 8 + length * 2 * 8 * 8, "attention.out_proj.weight": 8 * 8,
    }  # fmt: skip
    assert found.attention == 2 * length * 8
    per_token = counted(model, inputs, per_token=True)
    assert per_token.weights == {
        "embedding.weight": 8 * 20, "router": 8 * 5,
        "attention.in_proj_weight": 3 * 8 * 8, "attention.out_proj.weight": 8 * 8,
    }  # fmt: skip
    assert per_token.attention == found.attention


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_copy_without_weights_counts_as_the_model_does(name):
    model = FAMILIES[name].build()
    inputs = example_inputs(model, 1)
    found = counted(model, inputs, per_token=name in TEXT).weights
    budgeted = budget(model, "macs")
    stacked = {path: size for path, size in found.items() if any(part.isdigit() for part in path.split("."))}
    assert budgeted == stacked


def test_counting_leaves_the_model_and_random_numbers_as_they_were():
    model = tiny.bert().train()
    state, mask = torch.get_rng_state(), [module.training for module in model.modules()]
    multiply_adds_per_token(model)
    budget(model, "macs")
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == mask
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ZeroDivisionError):
        count_multiply_adds(model, lambda: 1 / 0, per_token=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
