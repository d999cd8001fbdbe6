import math

import pytest
import torch
from torch.nn import functional as F

from hf_slim import SlimError
from hf_slim.distillation.capture.attention_states import AttentionState
from hf_slim.distillation.losses import attention
from hf_slim.distillation.losses.attention import map_loss, relation_loss

MASK = torch.tensor([[1] * 12, [1] * 7 + [0] * 5, [0] * 4 + [1] * 8, [1] + [0] * 11])  # whole, right, left, one token


def states(heads, kv_heads, head_dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, count, 12, head_dim) for count in (heads, kv_heads, kv_heads)]
    return AttentionState(*(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes))


def with_gradient(state):
    return AttentionState(*(x.clone().requires_grad_() for x in (state.query, state.key, state.value)))


def naive_relation_loss(student, teacher, valid, relation_heads, causal):
    """The formula of the paper, one row, one part and one position at a time."""
    total = 0
    for name in ("query", "key", "value"):
        for row in range(len(valid)):
            kept = valid[row].nonzero().squeeze(1)
            parts = []
            for state in (student, teacher):
                joined = torch.cat(list(getattr(state, name)[row][:, kept]), dim=-1)
                width = joined.shape[-1] // relation_heads
                parts.append([joined[:, i * width : (i + 1) * width] for i in range(relation_heads)])
            for ours, theirs in zip(*parts, strict=True):
                for t in range(len(kept)):
                    seen = t + 1 if causal else len(kept)
                    ours_log, theirs_log = (
                        F.log_softmax(x[:seen] @ x[t] / math.sqrt(x.shape[-1]), 0) for x in (ours, theirs)
                    )
                    total = total + (theirs_log.exp() * (theirs_log - ours_log)).sum() / relation_heads
    return total


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [2**20, 400])
def test_relations_are_those_of_the_paper_with_their_gradient(causal, block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    teacher = states(heads=6, kv_heads=3, head_dim=8, seed=1)
    ours, theirs = (with_gradient(states(heads=4, kv_heads=2, head_dim=6)) for _ in range(2))
    loss = relation_loss(ours, teacher, MASK, 4, causal)
    expected = naive_relation_loss(theirs, teacher, MASK, 4, causal)
    loss.mul(0.3).backward()
    expected.mul(0.3).backward()
    torch.testing.assert_close(loss, expected)
    for name in ("query", "key", "value"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad)


def test_padding_gets_no_gradient_and_does_not_change_the_loss():
    student, teacher = with_gradient(states(4, 4, 8)), states(4, 4, 8, seed=1)
    relation_loss(student, teacher, MASK, 2).backward()
    hidden = ~MASK.bool()[:, None, :, None].expand_as(student.key)
    for name in ("query", "key", "value"):
        assert not getattr(student, name).grad[hidden].any()
    noisy = AttentionState(*(x.masked_fill(hidden, 1e4) for x in (student.query, student.key, student.value)))
    torch.testing.assert_close(relation_loss(noisy, teacher, MASK, 2), relation_loss(student, teacher, MASK, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_states_are_compared_in_float32_even_under_autocast(dtype):
    student, teacher = states(4, 2, 8, dtype=dtype), states(4, 2, 8, seed=1, dtype=dtype)
    wide = [AttentionState(s.query.double(), s.key.double(), s.value.double()) for s in (student, teacher)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = relation_loss(student, teacher, MASK, 4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), relation_loss(*wide, MASK, 4), rtol=1e-5, atol=1e-5)


def probabilities(heads, seed=0):
    scores = torch.randn(4, heads, 12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hidden = ~MASK.bool()[:, None, None, :]
    return (2 * scores).masked_fill(hidden, torch.finfo(torch.float64).min).softmax(-1)


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize("teacher_heads", [3, 5])
def test_maps_are_compared_row_by_row(kind, teacher_heads):
    ours, theirs = (probabilities(3).requires_grad_() for _ in range(2))
    teacher = probabilities(teacher_heads, seed=1)
    pair = (theirs, teacher) if teacher_heads == 3 else (theirs.mean(1, keepdim=True), teacher.mean(1, keepdim=True))
    expected = 0
    for row in range(4):
        kept = MASK[row].nonzero().squeeze(1)
        s, t = (maps[row][:, kept][:, :, kept] for maps in pair)
        s = s / s.sum(-1, keepdim=True)  # is 1 already; a perturbed row is brought back to it
        distance = t * (t.log() - s.log()) if kind == "kl" else (s - t).square() / len(kept)
        expected = expected + distance.sum() / len(s)
    loss = map_loss(ours, teacher, MASK, kind)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("loss", [relation_loss, map_loss])
def test_equal_attention_has_zero_loss_and_micro_batches_add_up(loss):
    if loss is map_loss:
        student, teacher = probabilities(4), probabilities(4, seed=1)

        def distance(ours, theirs, rows):
            return map_loss(ours[rows], theirs[rows], MASK[rows])
    else:
        student, teacher = states(4, 2, 8), states(6, 3, 8, seed=1)

        def distance(ours, theirs, rows):
            parts = [AttentionState(s.query[rows], s.key[rows], s.value[rows]) for s in (ours, theirs)]
            return relation_loss(*parts, MASK[rows], 4)

    everything = torch.arange(4)
    assert distance(student, student, everything).abs() < 1e-12
    parts = [distance(student, teacher, rows) for rows in everything.split([1, 2, 1])]
    torch.testing.assert_close(sum(parts), distance(student, teacher, everything))


def test_relation_heads_that_do_not_divide_are_refused():
    with pytest.raises(SlimError, match=r"`relation_heads` 5 .* student's query .*here: 1, 2, 4, 8, 16, 32"):
        relation_loss(states(4, 4, 8), states(4, 4, 8), MASK, 5)
    with pytest.raises(SlimError, match="same inputs"):
        relation_loss(states(4, 4, 8), states(4, 4, 8), MASK[:, :5], 4)
    with pytest.raises(SlimError, match="one of kl, mse"):
        map_loss(probabilities(2), probabilities(2), MASK, "cosine")
