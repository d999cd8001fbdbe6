"""What plain transformers, without hf_slim, makes of our folders: nothing is missing, and the values are ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from hf_slim import QuantizationConfig, convert, prepare
from hf_slim.core.contracts import PackedLayer
from hf_slim.core.host import is_transposed_linear
from tests import tiny
from tests.integration.formats.cells import plain_model

pytestmark = pytest.mark.slow
READER = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
transformers.utils.logging.set_verbosity_error()
results = {}
for folder in sys.argv[1:]:
    config = json.load(open(f"{folder}/config.json"))
    model_class = getattr(transformers, config["architectures"][0])
    model, found = model_class.from_pretrained(folder, output_loading_info=True)
    inputs = load_file(f"{folder}/inputs.safetensors")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    save_file({"logits": logits.contiguous()}, f"{folder}/logits.safetensors")
    results[folder] = {name: sorted(map(str, keys)) for name, keys in found.items() if keys}
assert "hf_slim" not in sys.modules
print(json.dumps(results))
"""
CASES = {  # format -> (family, settings)
    "compressed-tensors": [
        ("llama", {"scheme": "w4a16-g16"}), ("llama", {"scheme": "w3a16"}), ("llama", {"scheme": "w8a16"}),
        ("qwen3", {"scheme": "w2a16-g8"}), ("qwen3", {"scheme": "w6a16-tensor"}), ("gemma3", {"scheme": "w4a16"}),
        ("bert_mlm", {"scheme": "w4a16-g16"}),
        ("llama", {"scheme": "w4a16", "overrides": {"*.q_proj": "w8a16-g16"}}),
    ],
    "gemma": [
        ("llama", {"scheme": "w8a16", "embeddings": "w8a16"}), ("llama", {"scheme": "w4a16", "embeddings": "w2a16"}),
        ("qwen3", {"scheme": "w2a16"}), ("gemma3", {"scheme": "w4a16"}), ("bert_mlm", {"scheme": "w4a16"}),
        ("bert_mlm", {"scheme": "w8a16", "embeddings": "w8a16"}),
        ("t5", {"scheme": "w4a16", "ignore": ["*.wo"]}),
        ("llama", {"scheme": "w4a16", "overrides": {"*.layers.1.mlp.*": "w2a16"}}),
    ],
    "bitsandbytes": [
        ("llama", {"scheme": "nf4-g32"}), ("gpt2", {"scheme": "fp4-g32"}), ("bert_mlm", {"scheme": "nf4-g32"}),
    ],
}  # fmt: skip
TOLERANCE = {"bitsandbytes": 0.1}  # its CPU kernel computes in bfloat16


def dequantized(model: PreTrainedModel, plain: PreTrainedModel) -> PreTrainedModel:
    """The plain model with the values of the packed one."""
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLayer):
            weight = layer.dequantized(torch.float32) if isinstance(layer, nn.Linear) else rows_of(layer)
            own = plain.get_submodule(name)
            own.weight.data = weight.t() if is_transposed_linear(own) else weight
    return plain


def rows_of(embedding: nn.Embedding) -> torch.Tensor:
    return embedding(torch.arange(embedding.num_embeddings)).detach().float()


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    more = {"decoder_input_ids": tiny.tokens(seed=1)} if model.config.is_encoder_decoder else {}
    return {"input_ids": tiny.tokens()} | more


def run_plain(folders: list[Path]) -> dict:
    """What the reader says about each folder, in a process that has never imported hf_slim."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", READER, *map(str, folders)], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_computes_with_the_trained_values(name, tmp_path):
    if name == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    expected = {}
    for number, (family, settings) in enumerate(CASES[name]):
        folder = tmp_path / str(number)
        model = convert(prepare(plain_model(family), QuantizationConfig(save_format=name, **settings)))
        assert model.config.quantization_config.save_format == name, (family, settings)
        model.save_pretrained(folder)
        save_file(inputs_of(model), folder / "inputs.safetensors")
        expected[folder] = tiny.output(dequantized(model, plain_model(family)))
    found = run_plain(list(expected))
    assert not any(found.values()), found
    for (folder, wanted), case in zip(expected.items(), CASES[name], strict=True):
        logits = load_file(folder / "logits.safetensors")["logits"]
        allowed = TOLERANCE.get(name, 0.0) * wanted.abs().max()
        assert (logits - wanted).abs().max() <= allowed, (case, (logits - wanted).abs().max())


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "fp8", "w8a8-asym", "w8a8-unsigned", "w8a8-tensor", "w6a8-g16"])
def test_activations_are_rounded_by_compressed_tensors_too(scheme, tmp_path):
    pytest.importorskip("compressed_tensors")
    prepared = prepare(plain_model("llama"), QuantizationConfig(scheme, save_format="compressed-tensors"))
    wanted = tiny.output(prepared)  # the fake-quantized forward
    convert(prepared).save_pretrained(tmp_path)
    save_file(inputs_of(prepared), tmp_path / "inputs.safetensors")
    assert not any(run_plain([tmp_path]).values())
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    # it divides by the scale and hf_slim multiplies by its reciprocal: a code may differ by one step
    assert (logits - wanted).abs().max() < 0.05 * wanted.abs().max()
