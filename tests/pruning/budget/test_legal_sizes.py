import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_slim import PruningConfig, SlimError, convert, prepare
from hf_slim.pruning.transform import plan_pruning
from tests import tiny
from tests.core.test_errors import as_ours


def with_eight_heads():
    """64 channels: of 8, 4, 2 and 1 heads the config can be told, of 6 it cannot."""
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(**(tiny.LLAMA | sizes)))


def test_a_head_count_that_no_config_accepts_is_refused_with_those_that_are():
    with pytest.raises(SlimError, match=r"leaves 6 of 8.*accepts 4 \(sparsity 0\.5\), 2 .*uniform"):
        plan_pruning(with_eight_heads(), PruningConfig({"kv_heads": 0.25}))
    model = convert(prepare(with_eight_heads(), PruningConfig({"kv_heads": 0.5}, criterion="l1")))
    assert model.config.num_attention_heads == 4
    assert getattr(model.config, "quantization_config", None) is None


def test_a_mistake_of_ours_is_not_an_illegal_size(monkeypatch):
    def broken(cls, values):
        raise TypeError("ours")

    monkeypatch.setattr(LlamaConfig, "from_dict", classmethod(as_ours(broken)))
    with pytest.raises(TypeError, match=r"^ours$"):
        plan_pruning(with_eight_heads(), PruningConfig({"kv_heads": 0.5}))
    monkeypatch.setattr(LlamaConfig, "from_dict", classmethod(broken))  # raised by the host: no size is legal to it
    assert plan_pruning(with_eight_heads(), PruningConfig({"kv_heads": 0.5})).group_sets


def test_a_slim_folder_takes_any_head_count():
    config = PruningConfig({"kv_heads": 0.25}, uniform=False, criterion="l1")
    assert convert(prepare(with_eight_heads(), config)).config.quantization_config.mode == "pruned"


def test_a_model_whose_config_knows_no_fewer_heads_takes_any_count():
    model = convert(prepare(tiny.bert(), PruningConfig({"kv_heads": 0.25}, criterion="l1")))
    assert model.config.quantization_config.mode == "pruned"


@pytest.mark.parametrize("share", [0.3, 0.4, 0.55])
def test_a_hidden_width_is_the_nearest_legal_one(share):
    model = convert(prepare(tiny.llama(), PruningConfig({"hidden": share}, criterion="l1")))
    width = model.config.hidden_size
    assert width % 6 == 0
    assert abs(width - 48 * (1 - share)) <= 3
    assert model.lm_head.weight.shape == torch.Size([96, width])


def test_a_target_ends_in_a_legal_head_count():
    plan = plan_pruning(with_eight_heads(), PruningConfig(target={"parameters": 0.6}))
    assert {tuple(ends.tolist()) for name, ends in plan.ends.items() if "kv_heads" in name} == {(4, 6, 7)}
