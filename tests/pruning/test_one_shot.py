import pytest
import torch
from torch import nn

from hf_slim import PruningCallback, PruningConfig, SlimError, prune
from hf_slim.pruning.importance.criteria import CRITERIA
from hf_slim.pruning.importance.repair import repair_
from hf_slim.pruning.importance.statistics import watched
from tests import tiny

CONFIG = PruningConfig({"ffn": 0.25, "kv_heads": 0.34}, criterion="fisher", calibration_batches=2, repair=True)


def batches(count=2):
    return [{"input_ids": tiny.tokens(seed=seed), "labels": tiny.tokens(seed=seed)} for seed in range(count)]


@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_one_shot_gives_a_smaller_model(criterion, repair):
    if criterion == "angular":
        pytest.skip("scores whole layers only")
    config = PruningConfig({"ffn": 0.25}, criterion=criterion, calibration_batches=2, repair=repair)
    model = prune(tiny.llama(), config, batches())
    assert all(layer.mlp.up_proj.out_features == 48 for layer in model.model.layers)
    assert tiny.logits(model).isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_repair_is_the_least_squares_solution(bias):
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    rows = (torch.randn(200, 6, generator=generator, dtype=torch.float64) + 1) @ mixing
    rows += 0.1 * torch.randn(200, 12, generator=generator, dtype=torch.float64)
    layer, whole = nn.Linear(12, 5, bias).double(), nn.Linear(12, 5, bias).double()
    layer.load_state_dict(whole.state_dict())
    with watched(nn.ModuleDict({"layer": layer}), ["layer"], ("total", "products")) as moments:
        layer(rows.float().double())
    gone = torch.tensor([1, 4, 7])
    kept = torch.tensor([i for i in range(12) if i not in gone])
    with torch.no_grad():
        repair_(layer, gone, moments["layer"], damping=1e-12)
        inputs = torch.cat([rows[:, kept], torch.ones(200, 1)], 1) if bias else rows[:, kept]
        best = torch.linalg.lstsq(inputs, whole(rows)).solution
        torch.testing.assert_close(layer(rows), inputs @ best, rtol=1e-3, atol=1e-3)
    assert not layer.weight[:, gone].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_inputs_are_exact_under_autocast(dtype):
    torch.manual_seed(0)
    layer, rows = nn.Linear(12, 5), (torch.randn(300, 12) + 3).to(dtype)
    with (
        watched(nn.ModuleDict({"layer": layer}), ["layer"], ("total", "products")) as moments,
        torch.autocast("cpu", dtype),
    ):
        layer(rows)
    exact = rows.double()
    torch.testing.assert_close(moments["layer"].products.double(), exact.t() @ exact, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(moments["layer"].total.double(), exact.sum(0), rtol=1e-5, atol=1e-3)


def test_scores_that_are_not_finite_prune_nothing():
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 0] = float("inf")
    with pytest.raises(SlimError, match="are not finite on the calibration batches"):
        prune(model, PruningConfig({"ffn": 0.25}, criterion="wanda", calibration_batches=2), batches())
    assert model.model.layers[0].mlp.up_proj.out_features == 64


def test_repair_brings_the_output_nearer():
    whole = tiny.logits(tiny.llama())
    errors = {}
    for repair in (True, False):
        config = PruningConfig({"ffn": 0.5}, criterion="wanda", calibration_batches=8, repair=repair)
        errors[repair] = (tiny.logits(prune(tiny.llama(), config, batches(8))) - whole).norm().item()
    assert errors[True] < errors[False]


def test_without_batches_nothing_is_pruned():
    model = tiny.llama()
    with pytest.raises(SlimError, match="needs calibration batches, and there are none"):
        prune(model, CONFIG, [])
    assert model.model.layers[0].mlp.up_proj.out_features == 64


def test_a_criterion_of_gradients_needs_labels():
    with pytest.raises(SlimError, match="batches must hold `labels`"):
        prune(tiny.llama(), CONFIG, [{"input_ids": tiny.tokens()}])


@pytest.mark.parametrize("criterion", ["wanda", "taylor"])
def test_a_run_that_prunes_at_once_does_not_warn_of_an_early_end(criterion, tmp_path, caplog):
    config = PruningConfig({"ffn": 0.25}, criterion=criterion, calibration_batches=2)
    trainer = tiny.trainer(tiny.llama(), tmp_path, [PruningCallback(config)], max_steps=2)
    trainer.train()
    assert all(layer.mlp.up_proj.out_features == 48 for layer in trainer.model.model.layers)
    assert "short of its target" not in caplog.text


def test_repair_without_batches_to_look_at_is_refused():
    with pytest.raises(SlimError, match="calibration_batches"):
        PruningConfig({"ffn": 0.25}, repair=True)


@pytest.mark.parametrize("criterion", ["fisher", "wanda"])
def test_the_callback_prunes_before_the_first_step_and_resumes_alike(criterion, tmp_path):
    config = PruningConfig({"ffn": 0.25}, criterion=criterion, calibration_batches=2, repair=True)
    first_steps = []
    watch = tiny.EveryStep(
        lambda model: first_steps.append(int((model.model.layers[0].mlp.up_proj.weight == 0).all(1).sum()))
    )
    whole = tiny.trainer(
        tiny.llama(), tmp_path / "a", [PruningCallback(config), watch], save_strategy="steps", save_steps=4
    )
    whole.train()
    assert first_steps[0] == 16
    again = tiny.trainer(tiny.llama(), tmp_path / "b", [PruningCallback(config)])
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    expected = whole.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in again.model.state_dict().items())


@pytest.mark.parametrize(
    "criterion",
    [
        "wanda",
        "flap",
        "activation",
        "fisher",
        "fisher_mask",
        "movement",
        "taylor_sum",
        "l1_tail",
        "l2_tail",
        "peak",
        "random",
    ],
)
def test_every_criterion_prunes_gradually_and_resumes_alike(criterion, tmp_path):
    config = PruningConfig({"ffn": 0.5}, criterion=criterion, start=0.0, stop=0.9)
    whole = tiny.trainer(tiny.llama(), tmp_path / "a", [PruningCallback(config)], save_strategy="steps", save_steps=4)
    whole.train()
    assert whole.model.model.layers[0].mlp.up_proj.out_features == 32
    again = tiny.trainer(tiny.llama(), tmp_path / "b", [PruningCallback(config)])
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    expected = whole.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in again.model.state_dict().items())


@pytest.mark.parametrize("criterion", ["angular", "fisher_mask"])
def test_whole_layers_go_while_training_and_resume_alike(criterion, tmp_path):
    config = PruningConfig({"layers": 0.34}, criterion=criterion, start=0.0, stop=0.9)
    whole = tiny.trainer(tiny.llama(), tmp_path / "a", [PruningCallback(config)], save_strategy="steps", save_steps=4)
    whole.train()
    assert len(whole.model.model.layers) == 2
    again = tiny.trainer(tiny.llama(), tmp_path / "b", [PruningCallback(config)])
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    expected = whole.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in again.model.state_dict().items())


def test_calibration_can_tell_which_layers_turn_the_stream_least():
    config = PruningConfig({"layers": 0.34}, criterion="angular", calibration_batches=2)
    assert len(prune(tiny.llama(), config, batches()).model.layers) == 2


@pytest.mark.parametrize("kind", ["hidden", "attention_blocks"])
def test_repair_leaves_alone_what_the_stream_and_whole_blocks_hold(kind):
    settings = {"sparsity": {kind: 0.5}, "criterion": "l1", "calibration_batches": 4}
    plain, repaired = (
        prune(tiny.llama(), PruningConfig(**settings, repair=repair), batches(4)) for repair in (False, True)
    )
    assert repaired.lm_head.weight is repaired.model.embed_tokens.weight
    expected = plain.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in repaired.state_dict().items())
