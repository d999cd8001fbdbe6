"""A resumed run equals an uninterrupted one, bit for bit; teachers and projections are not in the saved model."""

import peft
import pytest
import torch
from safetensors.torch import load_file

from hf_slim import DistillationCallback
from hf_slim.distillation.losses.hidden_states import PROJECTIONS
from hf_slim.distillation.teachers.live import freeze_
from tests import tiny
from tests.distillation.gradients import padded_text

WIDE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "schedule": {"alpha": 0.8, "alpha_end": 0.2, "temperature": 2.0},
    "projections": {"hidden": {"loss": "mse"}, "attention": {"relation_heads": 4}},
    "on policy": {"on_policy": {"share": 0.5, "max_new_tokens": 4}},
}


def trained(folder, config, resume=None, **changes):
    callback = DistillationCallback(config, teacher=freeze_(tiny.llama(seed=7, **WIDE)))
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2} | changes
    trainer = tiny.trainer(tiny.llama(), folder, [callback], padded_text(), **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_resumed_is_as_uninterrupted(config, tmp_path):
    whole = trained(tmp_path, config, save_strategy="steps", save_steps=2)
    resumed = trained(tmp_path / "again", config, resume=str(tmp_path / "checkpoint-2"))
    states = [run.model.state_dict() for run in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    assert whole.state.log_history[1]["loss_distill"] == resumed.state.log_history[1]["loss_distill"]


def test_projections_are_trained_and_not_in_the_saved_model(tmp_path):
    trainer = trained(tmp_path, CONFIGS["projections"], save_strategy="steps", save_steps=2)
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert any(PROJECTIONS in name for name in kept)  # for resuming
    trainer.save_model(tmp_path / "final")
    assert load_file(tmp_path / "final" / "model.safetensors").keys() == {
        name for name in tiny.llama().state_dict() if name != "lm_head.weight"
    }
    later = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(not torch.equal(later[name], value) for name, value in kept.items() if PROJECTIONS in name)


def adapted():
    settings = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4, init_lora_weights=False)
    return peft.get_peft_model(tiny.llama(tie_word_embeddings=False), settings)


def test_the_teacher_of_a_student_with_adapters_is_the_model_without_them(tmp_path, monkeypatch):
    student, calls = adapted(), []
    callback = DistillationCallback({"hidden": {}})
    trainer = tiny.trainer(student, tmp_path, [callback], max_steps=2)
    (teacher,) = callback.distiller.teachers
    assert teacher.model is student  # no second copy
    forward = teacher.forward

    def recording(inputs, request):
        calls.append((inputs["input_ids"], forward(inputs, request)))
        return calls[-1][1]

    monkeypatch.setattr(teacher, "forward", recording)
    trainer.train()
    base = tiny.llama(tie_word_embeddings=False)
    for ids, output in calls:
        rows = torch.arange(ids.numel())
        with torch.no_grad():
            expected = base.eval()(input_ids=ids).logits
        torch.testing.assert_close(output.predictions.at(rows).states, expected.flatten(0, 1))
    assert len(calls) == 2


def test_evaluation_between_the_steps_does_not_run_the_teacher(tmp_path):
    callback = DistillationCallback(CONFIGS["projections"], teacher=freeze_(tiny.llama(seed=7, **WIDE)))
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = tiny.trainer(tiny.llama(), tmp_path, [callback], padded_text(), **settings)
    (teacher,), calls = callback.distiller.teachers, []
    forward = teacher.forward
    teacher.forward = lambda *given: calls.append(None) or forward(*given)
    trainer.train()
    assert len(calls) == 4
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2
    alone = tiny.trainer(trainer.model, tmp_path, [], padded_text()).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == alone  # the task's alone
