import math
import sys

import psutil
import pytest
import torch
from datasets import Dataset

from hf_slim import PruningConfig, QuantizationConfig, SlimError, convert, prepare
from hf_slim.data import DataConfig
from hf_slim.evaluation.compare import measure_models
from hf_slim.evaluation.config import EvaluationConfig
from hf_slim.evaluation.footprint import (
    disk_bytes,
    multiply_adds_per_token,
    parameter_count,
    peak_rss_bytes,
    ram_bytes,
)
from hf_slim.evaluation.latency import inference_speed, spread
from hf_slim.evaluation.picture import draw, draw_sensitivity
from hf_slim.evaluation.quality import perplexity, perplexity_with_interval
from hf_slim.evaluation.tasks import causal_lm  # noqa: F401  registers the task
from hf_slim.evaluation.tasks.task import TASKS, Side
from hf_slim.integration.kv_cache import cache_argument
from hf_slim.timing import interleaved_ms
from tests import tiny


def test_perplexity_is_that_of_the_models_own_loss():
    model, ids = tiny.llama().eval(), tiny.tokens(3)
    with torch.no_grad():
        expected = math.exp(model(input_ids=ids, labels=ids).loss.item())
    found = perplexity(model, Dataset.from_dict({"input_ids": ids.tolist()}))
    assert math.isclose(found, expected, rel_tol=1e-5)


def test_the_interval_of_a_perplexity_is_that_of_the_mean_loss_of_a_block():
    model, ids = tiny.llama(seed=3).eval(), tiny.tokens(9, seed=3)
    with torch.no_grad():
        losses = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in ids])
    margin = 1.96 * losses.std().item() / 3  # of nine blocks
    value, interval = perplexity_with_interval(model, Dataset.from_dict({"input_ids": ids.tolist()}))
    expected = [math.exp(losses.mean().item() + sign * margin) for sign in (-1, 1)]
    assert interval == pytest.approx(expected, rel=1e-5)
    assert interval[0] < value < interval[1]
    assert perplexity_with_interval(model, Dataset.from_dict({"input_ids": ids[:1].tolist()}))[1] is None


def test_counts_are_those_of_the_weights():
    model = tiny.llama()
    linear = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n)
    assert parameter_count(model) == sum(p.numel() for p in model.parameters())
    assert multiply_adds_per_token(model) == linear + 96 * 48  # the head is tied to the embedding
    assert ram_bytes(model) >= 4 * parameter_count(model)


def test_packing_keeps_the_count_and_quarters_the_bytes():
    model = tiny.llama()
    count, bytes_before = parameter_count(model), ram_bytes(model)
    convert(prepare(model, QuantizationConfig("w8a8", embeddings="w8a8")))
    assert parameter_count(model) == count
    assert ram_bytes(model) < bytes_before / 3


def test_pruning_lowers_every_count():
    model, before = tiny.llama(), tiny.llama()
    convert(prepare(model, PruningConfig(sparsity={"ffn": 0.5}, criterion="l2")))
    for measure in (parameter_count, multiply_adds_per_token, ram_bytes):
        assert measure(model) < measure(before)


class Unrunnable(type(tiny.llama())):
    def forward(self, *args, **kwargs):
        raise RuntimeError("no kernel for this")


def test_a_model_that_cannot_be_run_is_not_counted_and_says_so():
    with pytest.raises(SlimError, match=r"Unrunnable were not counted.*input_ids.*RuntimeError: no kernel for this"):
        multiply_adds_per_token(Unrunnable(tiny.llama().config))


def test_a_report_states_attention_apart_and_survives_a_count_that_fails(monkeypatch, caplog):
    settings = EvaluationConfig(blocks=1, prefill_tokens=8, decode_tokens=1, repeats=1, prompt="a")
    text, data = Dataset.from_dict({"text": ["some text " * 20]}), DataConfig(source="none", block_size=16)

    def compute():
        sides = {"base": Side(tiny.llama(vocab_size=tiny.VOCAB_SIZE), tiny.tokenizer())}
        return measure_models(TASKS["causal-lm"], sides, text, data, settings)["base"]["compute"]

    found = compute()
    assert found["multiply_adds_per_token"] == multiply_adds_per_token(tiny.llama())
    assert (found["attention_length"], found["attention_multiply_adds_per_token"]) == (8, 3 * 6 * 2 * 8 * 8)

    def fail(model):
        raise SlimError("not counted: why")

    monkeypatch.setattr("hf_slim.evaluation.compare.multiply_adds_per_token", fail)
    assert compute().keys() == {"parameters", "vocabulary"}
    assert "not counted: why" in caplog.text


def test_reports_do_not_count_as_model_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    (tmp_path / "report.png").write_bytes(b"1234567890")
    assert disk_bytes(tmp_path) == 5


def test_a_missing_matplotlib_costs_the_picture_and_nothing_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # import raises ImportError
    assert draw({"title": "t"}, tmp_path / "report.png") is False
    assert draw_sensitivity([], {}, tmp_path / "sensitivity.png") is False
    assert not any(tmp_path.iterdir())
    assert caplog.text.count("pip install 'hf_slim[demo]'") == 2


def test_peak_memory_covers_what_was_allocated():
    before, resident, more = peak_rss_bytes(), psutil.Process().memory_info().rss, 100 * 2**20
    block = torch.ones((before - resident + more) // 4)
    peak = peak_rss_bytes()
    assert before + 0.9 * more <= peak <= before + 1.5 * more
    del block
    assert peak_rss_bytes() >= peak - 2**20  # it never goes down; the kernel counts in batches of pages


def test_candidates_take_turns(monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr("hf_slim.timing.time.perf_counter", lambda: clock[0])

    def candidate(name, seconds):
        def call():
            calls.append(name)
            clock[0] += seconds * len(calls)  # every call takes longer than the last

        return call

    samples = interleaved_ms({"a": candidate("a", 0.001), "b": candidate("b", 0.01)}, repeats=3, title="t")
    assert calls == ["a", "b"] * 4
    assert samples["a"] == pytest.approx([3, 5, 7])  # without the warm-up, call 1
    assert samples["b"] == pytest.approx([40, 60, 80])
    assert spread([3.0, 1.0, 2.0])["median"] == 2.0


def test_decoding_starts_from_the_prompt_in_every_round():
    lengths, model = [], tiny.llama().eval()

    def watch(module, args, kwargs):
        cache = kwargs.get(cache_argument(model))
        lengths.append(cache.get_seq_length() if cache is not None else None)

    model.register_forward_pre_hook(watch, with_kwargs=True)
    speed = inference_speed({"m": model}, {"m": tiny.tokens(1)}, decode_tokens=3, repeats=2)
    assert lengths == [None] * 3 + [12, 13, 14] * 3
    assert speed["m"]["decode_tokens_per_s"]["median"] > 0
