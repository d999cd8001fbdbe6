import torch

from hf_slim.evaluation.tasks import causal_lm, classification  # noqa: F401  registers the tasks
from hf_slim.evaluation.tasks.task import TASKS
from hf_slim.evaluation.training_speed import StepTiming, training_speed
from tests import tiny


def test_both_sides_are_measured_on_the_same_parameters():
    model = tiny.llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    training = {"per_device_train_batch_size": 2, "use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True}
    configs = [tiny.QUANTIZATION, tiny.PRUNING, tiny.DISTILLATION]
    batch = {"input_ids": tiny.tokens(2), "labels": tiny.tokens(2)}
    speed = training_speed(TASKS["causal-lm"], model, configs, StepTiming(training, batch, repeats=2))
    assert {side: len(values["samples"]) for side, values in speed.items()} == {"base": 2, "result": 2}
    assert not any(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    neurons = model.model.layers[0].mlp.up_proj.weight
    assert not neurons.any(dim=1).all()  # the pruning callback was at work


def test_a_classifier_steps_as_well():
    training = {"per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True}
    batch = {"input_ids": tiny.tokens(2), "labels": torch.tensor([0, 2])}
    task = TASKS["sequence-classification"]
    speed = training_speed(task, tiny.bert(), [tiny.DISTILLATION], StepTiming(training, batch, repeats=2))
    assert min(speed["base"]["samples"] + speed["result"]["samples"]) > 0
