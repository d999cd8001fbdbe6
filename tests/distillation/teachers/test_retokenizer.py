"""Teachers with another tokenizer."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from hf_slim import DistillationCallback, SlimError
from hf_slim.distillation.teachers.live import freeze_
from hf_slim.distillation.teachers.retokenizer import NOT_ALIGNED, Retokenizer
from tests import tiny

PIECES = ["<end>", *(chr(code) for code in range(32, 126)), "th", "he", "in", "ab", "ba"]


def pairs_tokenizer() -> PreTrainedTokenizerFast:
    """Two characters at a time where it knows them, which is another vocabulary than that of single characters."""
    inner = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(PIECES)}, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("th|he|in|ab|ba|."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<end>")


def characters() -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.pad_token = made.eos_token
    return made


def ids_of(*texts: str) -> dict[str, torch.Tensor]:
    rows = [characters()(text)["input_ids"] for text in texts]
    length = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]), "attention_mask": mask}


@pytest.fixture
def joining(monkeypatch):
    """The tiny tokenizer writes single characters: joined without blanks between them."""
    decode = PreTrainedTokenizerFast.decode

    def joined(self, ids, **options):
        return "".join(self.convert_ids_to_tokens(ids)) if isinstance(ids, list) else decode(self, ids, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", joined)


def test_positions_are_aligned_where_token_boundaries_coincide(joining):
    inputs = ids_of("xthab", "in")
    retokenized, positions = Retokenizer(characters(), pairs_tokenizer()).retokenize(inputs)
    teacher = pairs_tokenizer()
    assert [teacher.convert_ids_to_tokens(int(i)) for i in retokenized["input_ids"][0]] == ["x", "th", "ab"]
    assert retokenized["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    # a token of both ends after x; after t only a token of the student ends, because "th" is one token of the teacher
    positions[positions == NOT_ALIGNED] = -9
    assert positions.tolist() == [0, -9, 1, -9, 2, -9, 3, -9, -9, -9]


def test_with_the_same_tokenizer_every_position_is_aligned_with_itself(joining):
    inputs = ids_of("another", "in")
    retokenized, positions = Retokenizer(characters(), characters()).retokenize(inputs)
    assert torch.equal(
        retokenized["input_ids"][inputs["attention_mask"] == 1], inputs["input_ids"][inputs["attention_mask"] == 1]
    )
    real = inputs["attention_mask"].flatten() == 1
    assert torch.equal(positions[real], torch.arange(14)[real])
    assert (positions[~real] == NOT_ALIGNED).all()


def gradients(tmp_path, callback):
    """Of one step on two texts of one length."""
    ids = ids_of("the inner bath", "abba in a bath")["input_ids"].tolist()
    watch, model = Gradients(), tiny.llama()
    args = TrainingArguments(str(tmp_path), max_steps=1, max_grad_norm=0.0, use_cpu=True, disable_tqdm=True)
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    Trainer(
        model, args, train_dataset=data, callbacks=[callback, watch], processing_class=characters()
    ).train()  # fmt: skip
    return watch.first


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.first = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_teacher_with_the_same_tokens_teaches_the_same(tmp_path, joining):
    config, teacher = {"losses": "universal"}, freeze_(tiny.llama(seed=7))
    plain = gradients(tmp_path, DistillationCallback(config, teacher))
    retokenized = gradients(tmp_path, DistillationCallback(config, teacher, teacher_tokenizer=characters()))
    for name, gradient in plain.items():
        torch.testing.assert_close(retokenized[name], gradient)


def test_a_teacher_with_another_vocabulary_gives_a_gradient(tmp_path, joining):
    teacher = freeze_(tiny.llama(seed=7, vocab_size=len(PIECES)))
    config = {"losses": "universal", "alpha": 1.0}
    found = gradients(tmp_path, DistillationCallback(config, teacher, teacher_tokenizer=pairs_tokenizer()))
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize(
    ("config", "says"),
    [({"losses": "forward_kl"}, "losses: universal"), ({"losses": "universal", "hidden": {}}, "without `hidden`")],
)
def test_what_only_one_vocabulary_can_say_is_refused(config, says, tmp_path):
    callback = DistillationCallback(config, teacher=freeze_(tiny.llama()), teacher_tokenizer=pairs_tokenizer())
    with pytest.raises(SlimError, match=says):
        tiny.trainer(tiny.llama(), tmp_path, [callback])


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(SlimError, match=r"fast tokenizers.*student"):
        Retokenizer(object(), pairs_tokenizer())
