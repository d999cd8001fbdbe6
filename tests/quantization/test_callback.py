import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_slim import QuantizationCallback, QuantizationConfig, SlimError, convert, prepare
from hf_slim.quantization.calibration import round_by_gptq_
from hf_slim.quantization.grids.gptq import gptq
from hf_slim.quantization.layers.scale_holders import InputQuantizer, WeightQuantizer, quantizers
from tests import tiny


class Watch(QuantizationCallback):
    """Keeps what quantizers hold after every step."""

    def __init__(self, config):
        super().__init__(config)
        self.scales, self.enabled = [], []

    def on_step_end(self, args, state, control, model, **kwargs):
        first = next(quantizers(model))
        self.enabled.append(first.enabled)
        self.scales.append(None if first.scale is None else first.scale.detach().clone())


LEARNED = {
    "lsq": QuantizationConfig("w4a16-g16", learn="lsq", observer="mse"),
    "lsq+": QuantizationConfig("w4a16", learn="lsq+"),
    "lsq, static activations": QuantizationConfig(
        "w8a8-static", learn="lsq", learn_activations="lsq", calibration_batches=2
    ),
    "lsq+, static activations": QuantizationConfig("w8a8-static", learn_activations="lsq+", calibration_batches=2),
    "pact": QuantizationConfig("w8a8-static", learn_activations="pact", calibration_batches=2),
    "codebook": QuantizationConfig("codebook3"),
    "gptq": QuantizationConfig("w3a16", initialize="gptq", calibration_batches=2),
    "gptq, lsq": QuantizationConfig(
        "w3a16-g16", initialize="gptq", learn="lsq", observer="mse", calibration_batches=2
    ),
    "frozen": QuantizationConfig("w4a16", freeze=0.5),
}


@pytest.mark.parametrize("name", list(LEARNED))
def test_what_quantizers_learn_is_trained_saved_and_reloaded(name, tmp_path, monkeypatch):
    tiny.only_reference_kernels(monkeypatch)
    model = tiny.llama()
    trainer = tiny.trainer(model, tmp_path, [QuantizationCallback(LEARNED[name])])
    learned = {n: p.detach().clone() for n, p in model.named_parameters() if "quantizer" in n}
    trained_logits = []
    trainer.add_callback(tiny.EveryStep(lambda model: trained_logits.append(tiny.logits(model))))
    trainer.train()
    assert torch.equal(tiny.logits(model), trained_logits[-1])  # packing changed nothing
    for parameter_name in learned:
        packed_name = parameter_name.replace("_quantizer.", "_").replace("offset", "zero_point")
        assert packed_name in model.state_dict()
    trainer.save_model(str(tmp_path / "small"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


@pytest.mark.parametrize("name", [name for name in LEARNED if "lsq" in name or name in ("pact", "codebook")])
def test_every_learned_parameter_moves_and_none_decays(name, tmp_path):
    model = tiny.llama()
    trainer = tiny.trainer(model, tmp_path, [QuantizationCallback(LEARNED[name])], weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "quantizer" in n}
    assert before
    trainer.create_optimizer()
    undecayed = {
        id(p) for group in trainer.optimizer.param_groups if not group["weight_decay"] for p in group["params"]
    }
    assert all(id(p) in undecayed for n, p in model.named_parameters() if "quantizer" in n)
    last = {}
    quantizer_state = lambda model: {n: p.detach().clone() for n, p in model.named_parameters() if "quantizer" in n}  # noqa: E731
    trainer.add_callback(tiny.EveryStep(lambda model: last.update(quantizer_state(model))))
    trainer.train()
    assert all(not torch.equal(last[n], before[n]) for n in before)


@pytest.mark.parametrize("name", ["lsq", "gptq, lsq", "pact", "codebook", "frozen"])
def test_an_interrupted_run_equals_an_uninterrupted_one(name, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = tiny.llama()
    tiny.trainer(whole, tmp_path / "whole", [QuantizationCallback(LEARNED[name])], **settings).train()
    resumed = tiny.llama()
    second = tiny.trainer(resumed, tmp_path / "whole", [QuantizationCallback(LEARNED[name])], **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_rounding_starts_when_it_should(tmp_path):
    callback = Watch(QuantizationConfig("w2a16", start=0.5))
    tiny.trainer(tiny.llama(), tmp_path, [callback]).train()
    assert callback.enabled == [False] * 4 + [True] * 4


@pytest.mark.parametrize("changes", [{}, {"learn": "lsq"}])
def test_scales_stop_moving_when_they_should(changes, tmp_path):
    callback = Watch(QuantizationConfig("w4a16", freeze=0.5, **changes))
    tiny.trainer(tiny.llama(), tmp_path, [callback]).train()
    moved = [not torch.equal(a, b) for a, b in zip(callback.scales, callback.scales[1:], strict=False)]
    assert moved == [True] * 3 + [False] * 4


def test_gptq_rounds_with_less_error_than_nearest(tmp_path):
    model, reference = tiny.llama(), tiny.llama()
    data = tiny.text_data()
    callback = QuantizationCallback(QuantizationConfig("w3a16", initialize="gptq", calibration_batches=8))
    trainer = tiny.trainer(model, tmp_path, [callback], data, learning_rate=0.0, max_steps=1)
    trainer.train()
    nearest = convert(prepare(tiny.llama(), QuantizationConfig("w3a16")))
    ids = torch.tensor(data["input_ids"])
    target = tiny.logits(reference, ids)
    assert (tiny.logits(model, ids) - target).norm() < 0.8 * (tiny.logits(nearest, ids) - target).norm()


def test_gptq_without_data_is_refused(tmp_path):
    callback = QuantizationCallback(QuantizationConfig("w3a16", initialize="gptq"))
    model = tiny.llama()
    trainer = tiny.trainer(model, tmp_path, [callback])
    with pytest.raises(SlimError, match="needs calibration batches"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model, train_dataloader=[])


def test_static_scales_without_data_are_refused_by_name():
    model = prepare(tiny.llama(), QuantizationConfig("w8a8-static"))
    with pytest.raises(
        SlimError, match=r"'model\.layers\.0\.self_attn\.q_proj': Static activation scales are not calibrated"
    ):
        convert(model)


def test_static_ranges_cover_the_first_batches_and_no_more():
    quantizer = InputQuantizer(QuantizationConfig("w8a8-static").linear_scheme().activations, calibration_batches=2)
    for batch in (torch.tensor([[-1.0, 2.0]]), torch.tensor([[0.5, 3.0]]), torch.tensor([[9.0, -9.0]])):
        quantizer(batch)
    assert quantizer.range.tolist() == [-1.0, 3.0]
    assert quantizer(torch.tensor([[100.0, 0.0]]))[0, 0] == quantizer.state().scale.view(()) * 127


def test_a_stored_scale_is_not_decayed():
    quantizer = WeightQuantizer(QuantizationConfig("w4a16").linear_scheme().weights, (4, 8), stored=True)
    assert isinstance(quantizer, nn.LayerNorm)  # Trainer excludes the parameters of such modules from weight decay
    assert quantizer.state_dict().keys() == {"scale"}


@torch.no_grad()
def test_masters_start_where_gptq_put_them_and_scales_fit():
    torch.manual_seed(0)
    layer, inputs = nn.Linear(24, 8, bias=False), torch.randn(60, 24) @ torch.randn(24, 24)
    weight = layer.weight.clone()
    config = QuantizationConfig("w3a16", initialize="gptq")
    model = prepare(nn.Sequential(layer), config)
    prepared = model[0]
    round_by_gptq_(model, lambda: (model(rows) for rows in inputs.split(20)), config.observer)
    expected, state = gptq(weight, inputs.t() @ inputs, prepared.scheme.weights, config.observer)
    torch.testing.assert_close(prepared.weight, expected, rtol=1e-4, atol=1e-5)
    scale = prepared.weight_quantizer.scale.view(8, 1)
    torch.testing.assert_close(scale, state.scale.view(8, 1), rtol=1e-4, atol=1e-6)
    rounded = model(torch.eye(24)).t()
    torch.testing.assert_close(rounded, (prepared.weight / scale).round().clamp(-4, 3) * scale)
    nearest = convert(prepare(nn.Sequential(_linear(weight)), QuantizationConfig("w3a16")))(torch.eye(24)).t()
    errors = [((values - weight) @ inputs.t()).norm() for values in (rounded, nearest)]
    assert errors[0] < 0.8 * errors[1]


def _linear(weight):
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data.copy_(weight)
    return layer


@pytest.mark.parametrize("scheme", ["w8a8", "codebook3", "w8a8-static", "w4a16-g16"])
def test_checkpointing_and_autocast_change_nothing_but_precision(scheme, tmp_path):
    """Gradient checkpointing runs a forward pass twice: what is observed or trained must not notice it."""
    trained = []
    for checkpointing in (False, True):
        model = tiny.llama()
        callback = QuantizationCallback({"scheme": scheme, "calibration_batches": 2})
        settings = {"bf16": True, "gradient_checkpointing": checkpointing, "max_steps": 3}
        trainer = tiny.trainer(model, tmp_path / str(checkpointing), [callback], **settings)
        before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
        last = {}
        trainer.add_callback(tiny.EveryStep(lambda model, last=last: last.update(copied(model))))
        trainer.train()
        assert not torch.equal(last["model.layers.0.mlp.up_proj.weight"], before)
        trained.append(last)
    plain, checkpointed = trained
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        assert torch.equal(checkpointed[name], value), name


def copied(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
