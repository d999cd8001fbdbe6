"""What a sequence classifier is fed and how it is judged."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from hf_slim import SlimDataError, SlimError
from hf_slim.data import DataConfig
from hf_slim.evaluation.config import EvaluationConfig
from hf_slim.evaluation.quality import accuracy_and_loss
from hf_slim.evaluation.tasks import classification  # noqa: F401  registers the task
from hf_slim.evaluation.tasks.task import TASKS, Side
from tests import tiny

TASK = TASKS["sequence-classification"]
DATA = DataConfig(source="reviews", block_size=12)


def rows(labels, **features):
    texts = [f"text {number} of a kind" for number in range(len(labels))]
    return Dataset.from_dict({"text": texts, "label": labels}, **features)


def padded_tokenizer():
    tokenizer = tiny.tokenizer()
    TASK.configure_(tiny.bert(), tokenizer)
    return tokenizer


def ids_of(data, label2id):
    """Text number -> id of its label, as the examples have it."""
    tokenizer = padded_tokenizer()
    examples = TASK.examples(data, tokenizer, label2id, DATA, len(data), 0)
    texts = ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in examples["input_ids"]]
    return {int(text.split()[1]): label for text, label in zip(texts, examples["labels"], strict=True)}


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        ([1, 0, 1], ["0", "1"], [1, 0, 1]),
        (["pos", "neg", "pos"], ["neg", "pos"], [1, 0, 1]),
        ([5, 2, 9], ["2", "5", "9"], [1, 0, 2]),  # gaps close
        ([10, 9, 10], ["9", "10"], [1, 0, 1]),  # in the order of numbers, not of letters
    ],
)
def test_classes_come_from_the_data(labels, names, ids):
    data = rows(labels)
    assert TASK.label_names(data, DATA) == names
    label2id = {name: number for number, name in enumerate(names)}
    assert ids_of(data, label2id) == dict(enumerate(ids))


def test_names_of_the_dataset_meet_the_ids_of_the_model():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["Negative", "Positive"])})
    data = rows([0, 1, 0], features=features)
    assert TASK.label_names(data, DATA) == ["Negative", "Positive"]
    assert ids_of(data, {"POSITIVE": 0, "NEGATIVE": 1}) == {0: 1, 1: 0, 2: 1}
    assert ids_of(data, {"LABEL_0": 0, "LABEL_1": 1}) == {0: 0, 1: 1, 2: 0}


@pytest.mark.parametrize(
    ("labels", "says"),
    [([0.5, 1.5], r"0\.5, which is not a class"), ([1, None], "None"), ([1, 1], "nothing to learn")],
)
def test_labels_that_are_no_classes_are_refused(labels, says):
    with pytest.raises(SlimDataError, match=says):
        TASK.label_names(rows(labels), DATA)


@pytest.mark.parametrize("labels", [[0, 1, -1], [0, 1, 2], ["0", "maybe", "1"]])
def test_a_label_that_the_model_does_not_know_is_refused(labels):
    with pytest.raises(SlimDataError, match=r"has the label '(-1|2|maybe)', and the model knows 0, 1"):
        TASK.examples(rows(labels), padded_tokenizer(), {"0": 0, "1": 1}, DATA, 3, 0)


def test_pairs_are_read_together_and_cut():
    data = Dataset.from_dict({"a": ["abcd", "x"], "b": ["efgh" * 9, "y"], "label": [0, 1]})
    config = DataConfig(source="pairs", text_column=["a", "b"], block_size=12)
    tokenizer = padded_tokenizer()
    examples = TASK.examples(data, tokenizer, {"0": 0, "1": 1}, config, 2, 0)
    read = sorted("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in examples["input_ids"])
    assert read == ["abcdefghefgh", "xy"]
    batch = TASK.collator(tokenizer)([examples[0], examples[1]])
    assert batch["input_ids"].shape == (2, 12)
    assert sorted(batch["attention_mask"].sum(1).tolist()) == [2, 12]


def test_accuracy_and_loss_do_not_hang_on_batches_or_padding():
    model, tokenizer = tiny.bert(), padded_tokenizer()
    data = Dataset.from_dict({"text": [f"{'ab' * (n + 1)}" for n in range(5)], "label": [0, 1, 2, 0, 1]})
    label2id = {"0": 0, "1": 1, "2": 2}
    examples = TASK.examples(data, tokenizer, label2id, DATA, 5, 0)
    one, all_at_once = (accuracy_and_loss(model, examples, TASK.collator(tokenizer), size, "x") for size in (1, 5))
    assert one[0] == all_at_once[0]
    assert one[1] == pytest.approx(all_at_once[1], rel=1e-5)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in examples])
    labels = torch.tensor(examples["labels"])
    assert one[0] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert one[1] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_throughput_is_that_of_the_stated_batch():
    shapes = []
    model = tiny.bert().eval()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    tokenizer = padded_tokenizer()
    settings = EvaluationConfig(blocks=1, batch_size=3, repeats=2)
    examples = TASK.examples(rows([0, 1] * 3), tokenizer, {"0": 0, "1": 1}, DATA, TASK.held_out(settings), 0)
    assert len(examples) == 3
    measured = TASK.measure({"x": Side(model, tokenizer)}, {"x": examples}, DATA, settings)["x"]
    assert shapes[:3] == [(3, 12)] * 3  # one to warm up, two that count
    assert measured["inference"]["samples_per_s"]["median"] > 0
    assert (measured["inference"]["batch_size"], measured["inference"]["tokens_per_sample"]) == (3, 12)
    assert measured["quality"]["examples"] == 3


def test_a_tokenizer_that_can_pad_nothing_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(SlimError, match="no padding token"):
        TASK.configure_(tiny.bert(), tokenizer)
