import pytest
import torch

from hf_slim import DistillationCallback, SlimError
from hf_slim.distillation.followed_layers import PROJECTIONS
from hf_slim.distillation.losses.hidden_states import HiddenConfig, hidden_sum, layer_map, projections_for
from hf_slim.distillation.teachers.live import freeze_
from tests import tiny


def states(layers: int, width: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 5, width, generator=generator, dtype=torch.float64) for _ in range(layers + 1)]


def test_layers_are_spread_over_the_teachers_from_embedding_to_last():
    assert layer_map(HiddenConfig(layers="even"), 3, 6) == {0: 0, 1: 2, 2: 4, 3: 6}
    assert layer_map(HiddenConfig(layers="last"), 3, 6) == {3: 6}
    assert layer_map(HiddenConfig(layers={"1": "4"}), 3, 6) == {1: 4}


@pytest.mark.parametrize(
    ("layers", "says"), [({4: 1}, "student, which has the layers 0.*to 3"), ({1: 7}, "teacher.*to 6")]
)
def test_a_layer_out_of_range_is_named(layers, says):
    with pytest.raises(SlimError, match=says):
        layer_map(HiddenConfig(layers=layers), 3, 6)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_the_sum_is_that_of_the_formula(loss, pooled):
    student, teacher, weights = (
        states(2, 4, 0),
        states(4, 4, 1),
        torch.tensor([[1.0] * 5, [2.0] * 5, [1.0, 1, 0, 0, 0]]),
    )
    layers = {0: 0, 2: 4}
    found = hidden_sum(student, teacher, layers, weights.double(), HiddenConfig(loss=loss, pooled=pooled))
    expected = 0
    for ours, theirs in ((student[0], teacher[0]), (student[2], teacher[4])):
        for row in range(3):
            tokens = [(ours[row, t], theirs[row, t], float(weights[row, t])) for t in range(5) if weights[row, t]]
            if pooled:
                share = sum(weight for *_, weight in tokens)
                mean = [sum(part[i] * part[2] for part in tokens) / share for i in (0, 1)]
                tokens = [(*mean, share)]
            for a, b, weight in tokens:
                distance = ((a - b) ** 2).mean() if loss == "mse" else 1 - torch.cosine_similarity(a, b, dim=0)
                expected = expected + weight * distance / 2
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_projections_are_trained_resumed_and_not_saved(tmp_path):
    teacher = freeze_(tiny.llama(seed=7, hidden_size=96, num_hidden_layers=6))
    model = tiny.llama()
    names = set(model.state_dict())
    callback = DistillationCallback({"hidden": {"loss": "mse"}}, teacher=teacher)
    trainer = tiny.trainer(model, tmp_path, [callback])
    start = {name: value.clone() for name, value in getattr(model, PROJECTIONS).state_dict().items()}
    moved = []
    trainer.add_callback(tiny.EveryStep(lambda model: moved.append(getattr(model, PROJECTIONS)["3"].weight.clone())))
    trainer.train()
    assert not torch.equal(moved[-1], start["3.weight"])
    assert set(model.state_dict()) == names
    assert {"loss_task", "loss_distill", "loss_forward_kl", "loss_hidden"} <= trainer.state.log_history[0].keys()


def test_equal_widths_need_no_projection():
    assert projections_for({0: 0}, 8, 8) is None
    assert projections_for({0: 0, 2: 4}, 8, 12)["2"].weight.shape == (12, 8)


def test_sentence_embeddings_need_neither_labels_nor_head(tmp_path):
    from transformers import BertModel

    student, teacher = BertModel(tiny.bert().config), freeze_(BertModel(tiny.bert(seed=1).config))
    data = tiny.class_data().remove_columns("labels")
    config = {"alpha": 1.0, "losses": {}, "hidden": {"layers": "last", "pooled": True}}
    trainer = tiny.trainer(student, tmp_path, [DistillationCallback(config, teacher=teacher)], data, logging_steps=1)
    trainer.train()
    found = [entry["loss_distill"] for entry in trainer.state.log_history if "loss_distill" in entry]
    assert found[-1] < found[0]
