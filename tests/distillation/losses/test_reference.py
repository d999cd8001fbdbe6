"""The gradient is that of the formulas, of whole logits in float64; taking logits apart changes nothing."""

import pytest
import torch
from torch.nn import functional as F

from hf_slim import QuantizationCallback
from hf_slim.distillation import distiller
from hf_slim.distillation.losses import fused
from hf_slim.distillation.losses.divergences import DIVERGENCES
from hf_slim.distillation.teachers import live as teacher
from tests import tiny
from tests.distillation.capture.test_output_layer import gemma2
from tests.distillation.gradients import Run, error, padded_examples, padded_text
from tests.distillation.test_gradients import TOKEN_WEIGHTS, gpt2, lora_head


def kl(p, q):
    return torch.xlogy(p, p / q).sum(-1)


NAIVE = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jensen_shannon": lambda p, q: 0.3 * kl(p, 0.3 * p + 0.7 * q) + 0.7 * kl(q, 0.3 * p + 0.7 * q),
    "skewed_kl": lambda p, q: kl(p, 0.2 * p + 0.8 * q),
    "skewed_reverse_kl": lambda p, q: kl(q, 0.2 * q + 0.8 * p),
    "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
    "universal": lambda p, q: (p.sort().values - q.sort().values).abs().sum(-1),
}
PARAMETERS = {"beta": 0.3, "skew": 0.2}


def double(family, **changes):
    return lambda seed=0: family(seed, **changes).double()


def of(family, **attributes):
    return Run(family, [lambda: family(seed=7)], **attributes)


def batch(data):
    return {name: torch.tensor(data[name]) for name in data.column_names}


def gradient_of(student, loss):
    loss.backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def answers(run, shift=True, **asked):
    """Both models' outputs, which positions count, and what they are to predict."""
    student, wise, inputs = run.student(), run.teachers[0](), batch(run.data())
    labels = inputs.pop("labels")
    weights = inputs.pop("token_weights", torch.ones(labels.shape))
    ours = student.train()(**inputs, **asked)
    with torch.no_grad():
        theirs = wise.eval()(**inputs, **asked)
    aligned = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift else labels
    counted = aligned != -100
    return student, ours, theirs, counted, aligned[counted], weights[counted].double(), inputs


@pytest.mark.parametrize("family", [tiny.llama, gpt2, tiny.bert_mlm], ids=["llama", "gpt2", "bert_mlm"])
@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_and_task(name, top_k, family, tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "CHUNK_BYTES", 4 * tiny.VOCAB_SIZE * 7)  # 7 rows of logits, 3 at a time
    monkeypatch.setattr(fused, "BLOCK_BYTES", 4 * tiny.VOCAB_SIZE * 3)
    config = {"losses": name, "top_k": top_k, "temperature": 2.0, "alpha": 0.3} | PARAMETERS
    run = of(double(family), config=config, data=lambda: padded_text(token_weights=TOKEN_WEIGHTS),
             settings={"remove_unused_columns": False})  # fmt: skip
    student, ours, theirs, counted, labels, weights, _ = answers(run, shift=family is not tiny.bert_mlm)
    p, q = ((made.logits[counted] / 2).softmax(-1) for made in (theirs, ours))
    if top_k:
        ids = p.topk(top_k).indices
        p, q = (torch.cat([r.gather(1, ids), 1 - r.gather(1, ids).sum(1, keepdim=True)], 1) for r in (p, q))
    divergence = (NAIVE[name](p, q) * weights).mean()
    loss = 0.7 * F.cross_entropy(ours.logits[counted], labels) + 0.3 * 4 * divergence
    assert error(run.gradient(tmp_path, 2, 4), gradient_of(student, loss)) < 1e-6


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_hidden_states(kind, pooled, tmp_path):
    run = of(double(tiny.llama), config={"losses": {}, "alpha": 1.0, "hidden": {"loss": kind, "pooled": pooled}})
    student, ours, theirs, counted, _, _, inputs = answers(run, output_hidden_states=True)
    mask, counts = inputs["attention_mask"].double(), counted.sum(1)
    shares = mask / mask.sum(1, keepdim=True)
    loss = 0
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        if pooled:
            a, b = ((states * shares[..., None]).sum(1, keepdim=True) for states in (a, b))
        distance = (a - b).square().mean(-1) if kind == "mse" else 1 - F.cosine_similarity(a, b, dim=-1)
        per_text = distance[:, 0] if pooled else (distance * shares).sum(1)
        loss = loss + (per_text * counts).sum() / counts.sum() / len(ours.hidden_states)
    assert error(run.gradient(tmp_path, 2, 4), gradient_of(student, loss)) < 1e-6


@pytest.mark.parametrize("family", [tiny.llama, tiny.bert_mlm], ids=["llama", "bert_mlm"])
def test_attention_maps(family, tmp_path):
    run = of(
        double(family, attn_implementation="eager"),
        config={"losses": {}, "alpha": 1.0, "attention": {"loss": "maps"}},
    )
    student, ours, theirs, counted, _, _, inputs = answers(run, family is tiny.llama, output_attentions=True)
    mask, counts = inputs["attention_mask"].double(), counted.sum(1)
    distance = kl(theirs.attentions[-1].clamp_min(1e-300), ours.attentions[-1].clamp_min(1e-300)).mean(1)
    loss = ((distance * mask).sum(1) / mask.sum(1) * counts).sum() / counts.sum()
    found = run.gradient(tmp_path, 2, 4)
    expected = gradient_of(student, loss)
    assert error({name: found[name] for name in expected}, expected) < 1e-5  # eager attention is in float32


@pytest.mark.parametrize("kind", ["classes", "number"])
def test_classifiers_and_regression(kind, tmp_path):
    changes = {"num_labels": 1} if kind == "number" else {}
    labels = [row % 3 if kind == "classes" else row / 3 for row in range(8)]
    run = of(lambda seed=0: tiny.bert(seed, **changes), data=lambda: padded_examples(labels), config={"alpha": 0.3})
    student, inputs = run.student().double(), batch(run.data())
    target = inputs.pop("labels")
    ours, theirs = student(**inputs).logits, run.teachers[0]().double()(**inputs).logits.detach()
    if kind == "classes":
        loss = 0.7 * F.cross_entropy(ours, target) + 0.3 * kl(theirs.softmax(-1), ours.softmax(-1)).mean()
    else:
        loss = 0.7 * F.mse_loss(ours[:, 0], target.double()) + 0.3 * F.mse_loss(ours, theirs)
    assert error(run.gradient(tmp_path, 2, 4), gradient_of(student, loss)) < 5e-6  # float32 against float64


WHOLE_LOGITS = {
    "llama": of(tiny.llama),
    "gpt2": of(gpt2),
    "bert_mlm": of(tiny.bert_mlm),
    "t5": of(tiny.t5),
    "mixtral": of(tiny.mixtral),
    "LoRA on the output layer": Run(lora_head),
    "rounded": Run(tiny.llama, others=lambda: [QuantizationCallback(tiny.QUANTIZATION)]),
}


@pytest.mark.parametrize("run", WHOLE_LOGITS.values(), ids=WHOLE_LOGITS.keys())
def test_without_whole_logits_the_gradient_is_the_same(run, tmp_path, monkeypatch):
    run = run.but(config={"temperature": 2.0, "losses": {"forward_kl": 1.0, "reverse_kl": 0.5}})
    with monkeypatch.context() as patch:
        patch.setattr(fused, "CHUNK_BYTES", 4 * tiny.VOCAB_SIZE * 7)
        patch.setattr(fused, "BLOCK_BYTES", 4 * tiny.VOCAB_SIZE * 3)
        found = run.gradient(tmp_path, 2, 4)
    monkeypatch.setattr(teacher, "split_of", lambda model: None)
    monkeypatch.setattr(distiller, "split_of", lambda model: None)
    assert error(found, run.gradient(tmp_path, 2, 4)) < 1e-6


@pytest.mark.parametrize("cap", [0.1, None])
def test_logits_that_are_capped_after_the_output_layer(cap, tmp_path):
    run = of(double(lambda seed=0, **c: gemma2(**c), final_logit_softcapping=cap), config={"alpha": 0.3})
    run = run.but(teachers=[double(tiny.llama)])
    student, ours, theirs, counted, labels, _, _ = answers(run)
    divergence = kl(theirs.logits[counted].softmax(-1), ours.logits[counted].softmax(-1)).mean()
    loss = 0.7 * F.cross_entropy(ours.logits[counted], labels) + 0.3 * divergence
    assert error(run.gradient(tmp_path, 2, 4), gradient_of(student, loss)) < 1e-6


def test_the_load_balancing_of_experts_is_kept(tmp_path):
    run = of(lambda seed=0: tiny.mixtral(seed, output_router_logits=True), config={"alpha": 0.3})
    student, ours, theirs, counted, labels, _, _ = answers(run)
    divergence = kl(theirs.logits[counted].softmax(-1), ours.logits[counted].softmax(-1)).mean()
    balance = student.router_aux_loss_coef * ours.aux_loss
    loss = 0.7 * (F.cross_entropy(ours.logits[counted], labels) + balance) + 0.3 * divergence
    assert error(run.gradient(tmp_path, 8), gradient_of(student, loss)) < 5e-6
