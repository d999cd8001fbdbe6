import pytest
import torch
from torch.optim import AdamW
from transformers import Trainer, TrainingArguments

from hf_slim import DistillationCallback, QuantizationCallback, QuantizationConfig, SlimError, prepare
from hf_slim.distillation.teachers.live import freeze_
from tests import tiny

LEARNED = QuantizationConfig("w4a16-g16", learn="lsq")


def trainer(model, folder, callback, optimizer):
    args = TrainingArguments(str(folder), max_steps=2, use_cpu=True, disable_tqdm=True, report_to="none")
    return Trainer(model, args, train_dataset=tiny.text_data(), callbacks=[callback], optimizers=(optimizer, None))


def callbacks():
    wide = freeze_(tiny.llama(seed=7, hidden_size=72))
    return {
        "scales": QuantizationCallback(LEARNED),
        "codebooks": QuantizationCallback(QuantizationConfig("codebook3")),
        "projections": DistillationCallback({"hidden": {}}, teacher=wide),
    }


@pytest.mark.parametrize("name", ["scales", "codebooks", "projections"])
def test_an_optimizer_that_was_made_too_early_is_refused_before_the_first_step(name, tmp_path):
    model = tiny.llama()
    made = trainer(model, tmp_path, callbacks()[name], AdamW(model.parameters(), lr=1e-3))
    with pytest.raises(SlimError, match=r"does not train .* parameters that were added to the model"):
        made.train()
    assert made.state.global_step == 0


def test_an_optimizer_that_was_made_after_prepare_trains_the_scales(tmp_path):
    model = prepare(tiny.llama(), LEARNED)
    before = {name: value.detach().clone() for name, value in model.named_parameters() if "quantizer" in name}
    last = {}
    made = trainer(model, tmp_path, QuantizationCallback(LEARNED), AdamW(model.parameters(), lr=1e-3))
    made.add_callback(
        tiny.EveryStep(lambda model: last.update({n: p.detach().clone() for n, p in model.named_parameters()}))
    )
    made.train()
    assert before
    assert all(not torch.equal(last[name], value) for name, value in before.items())


def test_an_optimizer_of_a_callback_that_adds_nothing_is_accepted(tmp_path):
    model = tiny.llama()
    trainer(model, tmp_path, QuantizationCallback({"scheme": "w8a8"}), AdamW(model.parameters(), lr=1e-3)).train()
