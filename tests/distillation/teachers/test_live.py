import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_slim import DistillationCallback, SlimError
from hf_slim.distillation.teachers.live import LiveTeacher, TeacherRequest, freeze_, memory_advice, self_teacher
from tests import tiny


def logits(teacher: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    found = LiveTeacher(teacher).forward({"input_ids": tiny.tokens(), **inputs}, TeacherRequest()).predictions
    return found.at(torch.arange(len(found.states))).states


def test_the_predictions_are_the_logits_of_the_model():
    for model in (tiny.llama(), tiny.bert(), tiny.bert_mlm()):
        expected = tiny.logits(freeze_(model)).flatten(0, -2)
        torch.testing.assert_close(logits(model, labels=tiny.tokens()), expected)


def test_a_teacher_reads_concatenated_texts_apart_and_keeps_its_setting():
    """Without an attention mask, positions that begin again say where a text begins; not where a cache is kept."""
    texts = [tiny.tokens(1, 7), tiny.tokens(1, 5, seed=1)]
    joined = torch.cat(texts, dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    model = freeze_(tiny.llama())
    assert model.config.use_cache
    found = LiveTeacher(model).forward({"input_ids": joined, "position_ids": positions}, TeacherRequest()).predictions
    together = found.at(torch.arange(12)).states
    apart = torch.cat([tiny.logits(model, ids).flatten(0, 1) for ids in texts])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert model.config.use_cache


@pytest.mark.parametrize(
    "on_disk", [["layers.1"], ["lm_head"], ["embed_tokens", "layers", "norm", "lm_head"]], ids=str
)
def test_an_offloaded_teacher_has_the_logits_of_one_in_memory(on_disk, tmp_path):
    whole = freeze_(tiny.llama(seed=7, tie_word_embeddings=False))
    whole.save_pretrained(tmp_path)
    names = ["embed_tokens", "norm", "rotary_emb", *(f"layers.{index}" for index in range(3))]
    places = {f"model.{name}": name for name in names} | {"lm_head": "lm_head"}
    device_map = {path: "disk" if name.startswith(tuple(on_disk)) else "cpu" for path, name in places.items()}
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "disk")
    assert any(parameter.is_meta for parameter in teacher.parameters())
    torch.testing.assert_close(logits(freeze_(teacher)), tiny.logits(whole).flatten(0, 1))
    callback = DistillationCallback({"alpha": 1.0, "hidden": {}}, teacher=teacher)
    tiny.trainer(tiny.llama(tie_word_embeddings=False), tmp_path / "run", [callback]).train()


@pytest.mark.parametrize(
    ("change", "says"),
    [(lambda model: model.train(), "training mode"), (lambda model: model.requires_grad_(True), "embed_tokens")],
)
def test_a_teacher_that_is_not_frozen_is_refused(change, says, tmp_path):
    teacher = change(freeze_(tiny.llama(seed=7)))
    with pytest.raises(SlimError, match=says):
        tiny.trainer(tiny.llama(), tmp_path, [DistillationCallback(teacher=teacher)])


def test_a_copy_of_a_model_that_trl_has_patched_is_independent_of_it(tmp_path):
    model = tiny.llama()
    before = tiny.logits(model.eval())
    args = SFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    SFTTrainer(model, args, train_dataset=tiny.text_data(2), processing_class=tiny.tokenizer())
    teacher = self_teacher(model)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    torch.testing.assert_close(tiny.logits(teacher), before)


def test_the_student_itself_cannot_be_passed_as_its_teacher(tmp_path):
    model = freeze_(tiny.llama())
    with pytest.raises(SlimError, match="shares weights"):
        tiny.trainer(model, tmp_path, [DistillationCallback(teacher=model)])


def test_classes_in_another_order_are_refused(tmp_path):
    teacher = freeze_(tiny.bert(id2label={0: "bad", 1: "good", 2: "so"}, label2id={"bad": 0, "good": 1, "so": 2}))
    student = tiny.bert(id2label={0: "good", 1: "bad", 2: "so"}, label2id={"good": 0, "bad": 1, "so": 2})
    with pytest.raises(SlimError, match="has its classes in another order"):
        tiny.trainer(student, tmp_path, [DistillationCallback(teacher=teacher)])


def test_text_that_is_too_long_for_the_teacher_is_named():
    with pytest.raises(SlimError, match="at most 8 tokens, got 12"):
        logits(freeze_(tiny.llama(max_position_embeddings=8)))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_named_teacher_is_loaded_with_the_requested_quantization(quantization, tmp_path):
    tiny.llama(seed=7, hidden_size=64, num_attention_heads=8, num_key_value_heads=8).save_pretrained(tmp_path / "it")
    callback = DistillationCallback({"teacher": str(tmp_path / "it"), "teacher_load": {"quantization": quantization}})
    trainer = tiny.trainer(tiny.llama(), tmp_path / "run", [callback], max_steps=2)
    assert callback.teacher.model.layers[0].mlp.up_proj.weight.dtype in (torch.uint8, torch.int8)
    trainer.train()
    assert trainer.state.log_history[0]["loss_distill"] > 0


def test_the_error_for_a_teacher_that_does_not_fit_names_smaller_ones(tmp_path, monkeypatch):
    tiny.llama(seed=7).save_pretrained(tmp_path / "it")

    def no_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_memory)
    with pytest.raises(SlimError, match=r"bfloat16` .* GB.*nf4` .* GB.*cache-teacher"):
        tiny.trainer(tiny.llama(), tmp_path, [DistillationCallback({"teacher": str(tmp_path / "it")})])


def test_the_advice_counts_what_the_weights_would_take():
    with torch.device("meta"):
        model = torch.nn.Linear(100_000, 10_000, bias=False)  # a billion weights
    assert "`dtype: bfloat16` 2.00 GB" in memory_advice(model)


def test_memory_that_ends_while_the_teacher_runs_is_explained():
    teacher = freeze_(tiny.llama())

    def no_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    live = LiveTeacher(teacher)
    teacher.forward = no_memory
    with pytest.raises(SlimError, match="not enough memory for the teacher"):
        live.forward({"input_ids": tiny.tokens()}, TeacherRequest())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"teacher_load": {"quantisation": "nf4"}}, "quantization"),
        ({"teacher_load": {"quantization": "nf5"}}, "nf4, fp4, int8"),
        ({"teacher": ["self"], "teacher_weights": [1.0, 2.0]}, "1 positive numbers"),
        ({"teacher": []}, "'self', a Hub id"),
        ({"temperature": 0}, "positive number"),
        ({"alpha": 0}, "would have no effect"),
        ({"losses": {}}, "neither `hidden` nor `attention` is set"),
        ({"losses": {"forward_kl": -1}}, "positive number"),
        ({"losses": "forward_lk"}, "forward_kl"),
        ({"losses": "jensen_shannon", "beta": 1}, "between 0 and 1"),
        ({"top_k": 0}, "`top_k` must be a whole number of at least 1, got 0. None compares all"),
        ({"hidden": {"layers": "evn"}}, "'even', 'last'"),
        ({"attention": {"loss": "map"}}, "relations, maps"),
        ({"on_policy": {"share": 2}}, "share"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, says):
    with pytest.raises(SlimError, match=says):
        DistillationCallback(config)
