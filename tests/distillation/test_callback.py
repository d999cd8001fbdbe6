import pytest
import torch
from transformers import TrainerCallback

from hf_slim import DistillationCallback, DistillationConfig, QuantizationCallback, SlimError
from hf_slim.distillation.teachers.live import freeze_ as frozen
from tests import tiny


class Gradients(TrainerCallback):
    """Keeps the gradient of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        control.should_training_stop = True


def first_gradient(family, tmp_path, data, config, **settings):
    watch = Gradients()
    teacher = frozen(tiny.FAMILIES[family](seed=7))
    callbacks = [DistillationCallback(config, teacher=teacher), watch]
    order = {"max_steps": 1, "max_grad_norm": 0.0, "data_seed": 3}
    tiny.trainer(tiny.FAMILIES[family](), tmp_path, callbacks, data, **(order | settings)).train()
    return watch.first


@pytest.mark.parametrize("family", ["llama", "bert", "bert_mlm"])
def test_accumulation_of_4_times_2_equals_1_times_8(family, tmp_path):
    data = tiny.class_data() if family == "bert" else tiny.text_data(ragged=True)
    config = DistillationConfig(alpha=0.5, temperature=2.0)
    whole = first_gradient(family, tmp_path, data, config, per_device_train_batch_size=8)
    parts = first_gradient(
        family, tmp_path, data, config, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        scale = gradient.abs().max()
        assert (parts[name] - gradient).abs().max() <= 2e-6 * scale + 1e-9, name


def test_the_gradient_is_that_of_the_formula(tmp_path):
    data = tiny.text_data(8, ragged=True)
    found = first_gradient("llama", tmp_path, data, DISTIL := DistillationConfig(alpha=0.3, temperature=2.0),
                           per_device_train_batch_size=8)  # fmt: skip
    student, teacher = tiny.llama().double(), tiny.llama(seed=7).double()
    ids, labels = torch.tensor(data["input_ids"]), torch.tensor(data["labels"])[:, 1:]
    counted = labels != -100
    answers = student(input_ids=ids).logits[:, :-1][counted]
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits[:, :-1][counted]
    t = DISTIL.temperature
    divergence = torch.nn.functional.kl_div(
        (answers / t).log_softmax(-1), (wanted / t).log_softmax(-1), reduction="batchmean", log_target=True
    )
    task = torch.nn.functional.cross_entropy(answers, labels[counted])
    ((1 - DISTIL.alpha) * task + DISTIL.alpha * t**2 * divergence).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name].double(), parameter.grad, rtol=1e-4, atol=1e-7)


def test_the_self_teacher_is_the_untouched_model(tmp_path):
    model = tiny.llama()
    before = tiny.logits(model)
    callback = DistillationCallback(tiny.DISTILLATION)
    tiny.trainer(model, tmp_path, [QuantizationCallback(tiny.QUANTIZATION), callback]).train()
    assert torch.equal(tiny.logits(callback.teacher), before)
    assert not any(parameter.requires_grad for parameter in callback.teacher.parameters())


def test_evaluation_never_runs_the_teacher(tmp_path):
    callback = DistillationCallback(tiny.DISTILLATION)
    trainer = tiny.trainer(tiny.llama(), tmp_path, [callback])
    callback.teacher.forward = None  # calling it would raise
    assert "eval_loss" in trainer.evaluate()
    with pytest.raises(TypeError):
        trainer.train()


def test_the_teacher_is_not_in_the_checkpoint(tmp_path):
    model = tiny.llama()
    names = set(model.state_dict())
    tiny.trainer(model, tmp_path, [DistillationCallback(tiny.DISTILLATION)])
    assert set(model.state_dict()) == names


def test_both_losses_are_logged_and_their_weighted_sum_is_the_loss(tmp_path):
    trainer = tiny.trainer(
        tiny.llama(), tmp_path, [DistillationCallback(DistillationConfig(alpha=0.25))],
        gradient_accumulation_steps=2, logging_steps=4,
    )  # fmt: skip
    trainer.train()
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        mixed = 0.75 * entry["loss_task"] + 0.25 * entry["loss_distill"]
        assert float(entry["loss"]) == pytest.approx(mixed, abs=2e-3)


def test_a_teacher_loads_from_a_folder(tmp_path):
    tiny.llama(seed=7).save_pretrained(tmp_path / "teacher")
    callback = DistillationCallback(DistillationConfig(teacher=str(tmp_path / "teacher")))
    tiny.trainer(tiny.llama(), tmp_path / "run", [callback]).train()
    assert torch.equal(tiny.logits(callback.teacher), tiny.logits(tiny.llama(seed=7)))


@pytest.mark.parametrize(
    ("student", "teacher", "says"),
    [
        (tiny.llama, lambda: tiny.llama(vocab_size=128), "another vocabulary.*128 against 96"),
        (tiny.bert, lambda: tiny.bert(num_labels=5), "another label set.*5 against 3"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_training(student, teacher, says, tmp_path):
    with pytest.raises(SlimError, match=says):
        tiny.trainer(student(), tmp_path, [DistillationCallback(teacher=frozen(teacher()))])


def test_a_missing_teacher_is_named(tmp_path):
    with pytest.raises(SlimError, match="no/such/model"):
        tiny.trainer(tiny.llama(), tmp_path, [DistillationCallback({"teacher": "no/such/model"})])


def test_two_teachers_in_one_trainer_are_refused(tmp_path):
    with pytest.raises(SlimError, match="Two DistillationCallbacks"):
        tiny.trainer(tiny.llama(), tmp_path, [DistillationCallback(), DistillationCallback()])


def test_training_continues_in_a_second_call(tmp_path):
    trainer = tiny.trainer(tiny.llama(), tmp_path, [DistillationCallback()])
    for _ in range(2):
        trainer.train()
        assert "loss_distill" in trainer.state.log_history[0]


def test_a_callback_that_was_added_too_late_is_an_error(tmp_path):
    trainer = tiny.trainer(tiny.llama(), tmp_path, [])
    trainer.add_callback(DistillationCallback())
    with pytest.raises(SlimError, match="did not reach the optimizer"):
        trainer.train()


def test_with_label_smoothing_the_error_says_to_attach(tmp_path):
    trainer = tiny.trainer(tiny.llama(), tmp_path, [DistillationCallback()], label_smoothing_factor=0.1)
    with pytest.raises(SlimError, match="attach"):
        trainer.train()


def test_a_term_that_never_reaches_the_optimizer_is_an_error(tmp_path):
    trainer = tiny.trainer(tiny.llama(), tmp_path, [DistillationCallback()])
    inner = trainer.compute_loss

    def own_loss(model, inputs, return_outputs=False, **kwargs):
        inner(model, inputs, **kwargs)
        return model.lm_head.weight.square().mean()

    trainer.compute_loss = own_loss
    with pytest.raises(SlimError, match="did not reach the optimizer"):
        trainer.train()


def test_a_teacher_with_nan_logits_is_an_error(tmp_path):
    teacher = frozen(tiny.llama())
    teacher.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(SlimError, match="contain NaN"):
        tiny.trainer(tiny.llama(), tmp_path, [DistillationCallback(teacher=teacher)]).train()


def test_a_step_without_any_label_leaves_weights_finite(tmp_path):
    data = tiny.text_data(8)
    unlabelled = data.remove_columns("labels").add_column("labels", [[-100] * 12] * len(data))
    model, callback = tiny.llama(), DistillationCallback({"teacher": "self", "hidden": {}})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tiny.trainer(model, tmp_path, [callback], unlabelled, max_steps=2, weight_decay=0.0).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
