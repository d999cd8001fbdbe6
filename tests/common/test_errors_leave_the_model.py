"""Whatever puts a model into another state for a while leaves it as it was when an error comes in between."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments, default_data_collator

from hf_slim import DistillationCallback, PruningCallback, PruningConfig, prune
from hf_slim.core.modules import temporary_hooks
from hf_slim.distillation import distiller
from hf_slim.distillation.capture.output_layer import split_of
from hf_slim.distillation.followed_layers import map_layers_
from hf_slim.distillation.losses.hidden_states import HiddenConfig
from hf_slim.distillation.on_policy import OnPolicyConfig, generated_completions
from hf_slim.distillation.teachers.live import LiveTeacher, TeacherRequest, freeze_
from hf_slim.evaluation.quality import accuracy_and_loss, perplexity
from hf_slim.evaluation.sensitivity import measure_sensitivity
from hf_slim.pruning.budget.latency import measure_latency
from hf_slim.pruning.importance.repair import repair_readers_
from hf_slim.pruning.importance.scores import observed
from hf_slim.pruning.structure.find import find_group_sets
from hf_slim.quantization.calibration import round_by_gptq_
from hf_slim.student.make import importance_of
from tests import tiny
from tests.states import Broken, breaking, hooks_of, in_mixed_modes, lora, raise_broken, rounded, state_of, weights_of

BATCHES = [{"input_ids": tiny.tokens(seed=seed), "labels": tiny.tokens(seed=seed)} for seed in range(3)]
BLOCKS = Dataset.from_dict({"input_ids": tiny.tokens(3).tolist(), "labels": [0, 1, 2]})


def that_has_shown_states() -> nn.Module:
    """transformers hooks the layers of a model for good when it is asked for hidden states for the first time."""
    model = tiny.llama()
    model(**BATCHES[0], output_hidden_states=True)
    return model


def passes(model: nn.Module) -> Callable:
    """What calibration is handed: one forward pass for every batch."""

    def run(with_gradient: bool = False):
        for batch in BATCHES:
            yield model(**batch)

    return run


def prune_in_callback(model: nn.Module, folder: Path) -> None:
    callback = PruningCallback({"sparsity": {"ffn": 0.25}, "criterion": "wanda", "calibration_batches": 3})
    args, state, control = TrainingArguments(str(folder), use_cpu=True), TrainerState(max_steps=4), TrainerControl()
    callback.on_init_end(args, state, control, model)
    callback.on_train_begin(args, state, control, model, train_dataloader=BATCHES)


def prune_at_once(criterion: str) -> Callable:
    config = PruningConfig({"ffn": 0.25}, criterion=criterion, calibration_batches=3, repair=True)
    return lambda model, folder: prune(model, config, BATCHES)


def repair(model: nn.Module, folder: Path) -> None:
    sets = [found for found in find_group_sets(model) if found.kind == "ffn"]
    repair_readers_(model, sets, {found.name: [1, 2] for found in sets}, passes(model))


def watch(model: nn.Module, folder: Path) -> None:
    sets = find_group_sets(model)
    criterion = PruningConfig({"ffn": 0.5, "layers": 0.5}, criterion={"ffn": "wanda", "layers": "angular"}).criterion
    with observed(model, [found for found in sets if found.kind in ("ffn", "layers")], criterion):
        model(**BATCHES[0])


def importance(model: nn.Module, folder: Path) -> None:
    sets = [found for found in find_group_sets(model) if found.kind in ("ffn", "layers")]
    importance_of(model, sets, [{"input_ids": batch["input_ids"]} for batch in BATCHES])


def teach_itself(model: nn.Module, folder: Path) -> None:
    LiveTeacher(model, is_student=True).forward(BATCHES[0], TeacherRequest())


def run_head_without_adapters(model: nn.Module, folder: Path) -> None:
    predictions = LiveTeacher(model, is_student=True).forward(BATCHES[0], TeacherRequest()).predictions
    predictions.head(torch.zeros(2, 3))  # of another width than the layer


def generate(model: nn.Module, folder: Path) -> None:
    generated_completions(model, BATCHES[0], OnPolicyConfig(max_new_tokens=4), 0)


def accuracy(model: nn.Module, folder: Path) -> None:
    accuracy_and_loss(model, BLOCKS, default_data_collator, 1, "x")


# what is done -> (the model, the forward pass in which it fails, what is done)
CASES: dict[str, tuple[Callable[[], nn.Module], int, Callable[[nn.Module, Path], object]]] = {
    "GPTQ": (rounded, 2, lambda model, folder: round_by_gptq_(model, passes(model), "minmax")),
    "pruning at once in the callback": (tiny.llama, 2, prune_in_callback),
    "pruning at once by activations": (tiny.llama, 2, prune_at_once("wanda")),
    "pruning at once by gradients": (tiny.llama, 2, prune_at_once("fisher")),
    "pruning at once, repair": (tiny.llama, 4, prune_at_once("wanda")),
    "repair": (tiny.llama, 2, repair),
    "watching": (tiny.llama, 1, watch),
    "importance for a student": (tiny.llama, 2, importance),
    "perplexity": (tiny.llama, 2, lambda model, folder: perplexity(model, BLOCKS)),
    "accuracy": (tiny.bert, 2, accuracy),
    "sensitivity": (
        tiny.llama, 3, lambda model, folder: measure_sensitivity(model, [tiny.tokens(1)] * 2, ["w4a16", "w8a16"]),
    ),
    "generated completions": (tiny.llama, 2, generate),
    "generated completions, adapters": (lora, 2, generate),
    "a look at the output layer": (tiny.llama, 1, lambda model, folder: split_of(model)),
    "a look at the layers": (
        that_has_shown_states, 1,
        lambda model, folder: map_layers_(model, [LiveTeacher(freeze_(tiny.llama(seed=7)))], HiddenConfig()),
    ),
    "teaching itself": (lora, 3, teach_itself),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_error_in_a_forward_pass_leaves_the_model_as_it_was(case, tmp_path):
    build, calls, act = CASES[case]
    model = breaking(in_mixed_modes(build()), calls)
    before, weights = state_of(model), weights_of(model)
    with pytest.raises(Broken):
        act(model, tmp_path)
    found = state_of(model)
    if case == "pruning at once in the callback":  # the callback of a run goes on claiming the model
        assert found.pop("record")[0].keys() == {"pruning"}
        before.pop("record")
    assert found == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", [name for name in CASES if name != "teaching itself"])
def test_the_forward_pass_that_fails_is_one_that_is_made(case, tmp_path):
    """The tests above would be empty if the passes before had put the model into no other state."""
    build, calls, act = CASES[case]
    model, modes = build().train(), []
    stack = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    stack[1].register_forward_pre_hook(lambda module, *given: modes.append(module.training))
    act(model, tmp_path)
    assert len(modes) >= calls
    assert modes[calls - 1] == (case in ("watching", "repair"))  # their callers choose the mode


def test_an_output_layer_that_fails_gets_its_adapters_back(tmp_path):
    model = in_mixed_modes(lora())
    before = state_of(model)
    with pytest.raises(RuntimeError, match="shape"):
        run_head_without_adapters(model, tmp_path)
    assert state_of(model) == before


@pytest.mark.parametrize("batches", [[], [{"input_ids": tiny.tokens()}]], ids=["none", "not finite"])
def test_gptq_that_is_refused_leaves_weights_modes_and_quantizers(batches):
    model = in_mixed_modes(rounded())
    if batches:  # the first layer's inputs are finite, the second's are not
        model.model.layers[1].input_layernorm.weight.data.fill_(float("inf"))
    before, weights = state_of(model), weights_of(model)
    with pytest.raises(ValueError, match=r"are not finite|needs calibration batches"):
        round_by_gptq_(model, lambda: (model(**batch) for batch in batches), "minmax")
    assert state_of(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_latency_that_cannot_be_measured_leaves_the_model(monkeypatch):
    model = in_mixed_modes(tiny.llama())
    before, weights, numbers = state_of(model), weights_of(model), torch.get_rng_state()
    monkeypatch.setattr("hf_slim.pruning.budget.latency._times", lambda jobs, given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_latency(model, [found for found in find_group_sets(model) if found.kind == "ffn"], PruningConfig())
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_could_not_be_pruned_takes_another_config():
    model = tiny.llama()
    with pytest.raises(ValueError, match="there are none"):
        prune(model, PruningConfig({"ffn": 0.5}, criterion="wanda"), [])
    assert prune(model, PruningConfig({"ffn": 0.25}, criterion="wanda"), BATCHES).config.intermediate_size == 48


@pytest.mark.parametrize("kind", ["ffn", "layers"])
def test_pruning_at_once_keeps_every_module_in_its_mode(kind):
    model = tiny.llama().eval()
    model.model.norm.train()
    prune(model, PruningConfig({kind: 0.34}, criterion="fisher_mask"), BATCHES)
    assert [name for name, module in model.named_modules() if module.training] == ["model.norm"]


def test_a_run_that_failed_is_not_watched_twice(tmp_path):
    model = tiny.llama()
    callback = PruningCallback(PruningConfig({"ffn": 0.5}, criterion="wanda", start=0.0))
    trainer = tiny.trainer(model, tmp_path, [callback])
    counts = []
    trainer.add_callback(tiny.EveryStep(lambda model: counts.append(hooks_of(model))))
    with pytest.raises(Broken), temporary_hooks([model.register_forward_pre_hook(raise_broken)]):
        trainer.train()
    assert hooks_of(model) > 0  # nobody tells a callback of the error
    trainer.train()
    assert counts[0] == 3  # one layer each that reads neurons
    assert hooks_of(model) == 0


@pytest.mark.parametrize("where", ["recorder", "forward"])
def test_a_student_that_fails_in_its_forward_pass_is_no_longer_tapped(where, tmp_path, monkeypatch):
    student = tiny.llama()
    callback = DistillationCallback({"attention": {}, "hidden": {}}, teacher=freeze_(tiny.llama(seed=7)))
    trainer = tiny.trainer(student, tmp_path, [callback])
    before, head = state_of(student), student.lm_head._forward_pre_hooks
    taps = []

    def refuse(*given: object) -> None:
        taps.append(len(head))
        raise Broken

    if where == "recorder":
        monkeypatch.setattr(distiller, "attention_states", refuse)
    else:
        monkeypatch.setattr(type(student.model.layers[2].mlp), "forward", refuse)
        monkeypatch.setattr(callback.distiller.teachers[0], "forward", lambda *given: None)
    with pytest.raises(Broken) as error:
        trainer.train()
    assert taps == [1]  # it was
    assert state_of(student)["hooks"] == before["hooks"]
    assert error.traceback  # holds on to everything that was open when it was raised
