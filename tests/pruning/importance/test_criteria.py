"""Every criterion against its formula, in float64, on random blocks of weights, biases and kernels."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_slim.pruning.importance.criteria import CRITERIA, Evidence, place_sums
from hf_slim.pruning.importance.statistics import SUMS, AngularDistance, Moments

COUNT = 7
SHAPES = [(COUNT, 3, 5), (COUNT, 3, 1), (COUNT, 2, 2), (COUNT, 1, 3, 2)]  # rows, biases, columns, kernels
READS = [False, False, True, True]


def draw(*shape: int, seed: int) -> Tensor:
    """Random values, a few of them much larger than the others."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) ** 3


def inputs(width: int, seed: int) -> tuple[Moments, Tensor]:
    """What flowed into the places of a block: its sums, and the 40 tokens themselves, `(tokens, count, width)`."""
    tokens = draw(40, COUNT, width, seed=seed) + 0.5
    found = {name: add(tokens.flatten(1)).view(COUNT, width) for name, add in SUMS.items() if name != "products"}
    return Moments(40.0, **found), tokens.double()


INPUTS = [inputs(2, 21), inputs(1, 22)]
EVIDENCE = Evidence(
    weights=[draw(*shape, seed=seed) for seed, shape in enumerate(SHAPES)],
    gradients=[draw(*shape, seed=10 + seed) for seed, shape in enumerate(SHAPES)],
    reads=READS,
    inputs=[moments for moments, _ in INPUTS],
    angular_distance=AngularDistance(8.0, torch.tensor(2.0)),
    seed=5,
)
WEIGHTS = [weight.double().flatten(2) for weight in EVIDENCE.weights]  # (count, width, the rest)
PRODUCTS = [w * g.double().flatten(2) for w, g in zip(WEIGHTS, EVIDENCE.gradients, strict=True)]
MATRICES = [weight for weight in WEIGHTS if weight.shape[2] > 1]


def total(blocks: list[Tensor]) -> Tensor:
    """Summed over everything that belongs to a group: `(count,)`."""
    return sum(block.flatten(1).sum(1) for block in blocks)


def tails(order: int) -> Tensor:
    relative = [(weight.abs() / weight.abs().mean()).flatten(1) for weight in MATRICES]
    return sum((one - 4).clamp(min=0).norm(order, dim=1) + 1e-3 * one.mean(1) for one in relative)


def peaks() -> Tensor:
    largest = torch.stack([weight.abs().flatten(1).amax(1) for weight in MATRICES])
    return (largest / largest.mean(1, keepdim=True)).amax(0)


def of_inputs(formula) -> Tensor:
    """The sum over the blocks that read, and over their places, of `formula(tokens, weights of the place)`."""
    blocks = zip(WEIGHTS[2:], INPUTS, strict=True)
    return sum(formula(tokens, weight).sum(1) for weight, (_, tokens) in blocks)


FORMULAS = {
    "taylor": lambda: total([block.abs() for block in PRODUCTS]),
    "taylor_sum": lambda: total(PRODUCTS).abs(),
    "fisher": lambda: total([block**2 for block in PRODUCTS]) / 2,
    "fisher_mask": lambda: total(PRODUCTS[2:]) ** 2 / 2,
    "movement": lambda: -total(PRODUCTS),
    "l1": lambda: total([weight.abs() for weight in WEIGHTS]),
    "l2": lambda: total([weight**2 for weight in WEIGHTS]).sqrt(),
    "l1_tail": lambda: tails(1),
    "l2_tail": lambda: tails(2),
    "peak": peaks,
    "activation": lambda: of_inputs(lambda x, w: x.abs().mean(0)),
    "wanda": lambda: of_inputs(lambda x, w: x.norm(dim=0) * w.abs().sum(2)),
    "flap": lambda: of_inputs(lambda x, w: x.var(0, correction=0) * (w**2).sum(2)),
    "angular": lambda: torch.tensor([0.25], dtype=torch.float64),
}  # fmt: skip


def as_needed(name: str) -> Evidence:
    """The evidence with nothing but what the criterion says that it looks at."""
    criterion = CRITERIA[name]
    kept = [
        Moments(moments.tokens, **{sums: getattr(moments, sums) for sums in criterion.sums})
        for moments in EVIDENCE.inputs
    ]
    return replace(
        EVIDENCE,
        gradients=EVIDENCE.gradients if criterion.needs_gradient else [],
        inputs=kept if criterion.sums else [],
        angular_distance=EVIDENCE.angular_distance if criterion.needs_angular_distance else None,
    )


def test_every_criterion_has_a_formula():
    assert set(FORMULAS) | {"random"} == set(CRITERIA)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_criterion_is_its_formula_and_asks_for_what_it_looks_at(name):
    before = [tensor.clone() for tensor in (*EVIDENCE.weights, *EVIDENCE.gradients)]
    score = CRITERIA[name].score(as_needed(name))
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), FORMULAS[name](), rtol=1e-5, atol=1e-6)
    after = (*EVIDENCE.weights, *EVIDENCE.gradients)
    assert all(torch.equal(new, old) for new, old in zip(after, before, strict=True))


def test_groups_that_nothing_reads_are_masked_where_they_are_written():
    score = CRITERIA["fisher_mask"].score(replace(as_needed("fisher_mask"), reads=[False] * 4))
    torch.testing.assert_close(score.double(), total(PRODUCTS) ** 2 / 2, rtol=1e-5, atol=0)


def test_random_scores_differ_between_sets_and_not_between_runs():
    first, again = (CRITERIA["random"].score(as_needed("random")) for _ in range(2))
    other = CRITERIA["random"].score(replace(EVIDENCE, seed=6))
    assert torch.equal(first, again)
    assert first.shape == (COUNT,)
    assert not torch.equal(first, other)


def test_only_changes_of_the_loss_and_angles_compare_between_layers():
    alike = {"taylor", "taylor_sum", "fisher", "fisher_mask", "movement", "angular"}
    assert {name for name in CRITERIA if CRITERIA[name].comparable} == alike


def test_only_criteria_of_activations_need_forward_passes():
    inside = {"activation", "wanda", "flap", "angular"}
    assert {name for name in CRITERIA if CRITERIA[name].looks_inside} == inside
    graded = {"taylor", "taylor_sum", "fisher", "fisher_mask", "movement"}
    assert {name for name in CRITERIA if CRITERIA[name].needs_gradient} == graded


@pytest.mark.parametrize(
    ("name", "changes"), [("taylor", {"gradients": EVIDENCE.gradients[:3]}), ("fisher_mask", {"reads": READS[:3]}),
                          ("wanda", {"inputs": EVIDENCE.inputs[:1]}), ("wanda", {"reads": READS[:3]})],
)  # fmt: skip
def test_evidence_that_lacks_a_part_is_an_error(name, changes):
    with pytest.raises(ValueError, match="shorter"):
        CRITERIA[name].score(replace(EVIDENCE, **changes))


def test_a_group_may_be_alone_in_its_set():
    weight = draw(1, 3, 5, seed=1)
    alone = Evidence([weight])
    relative = (weight.abs() / weight.abs().mean()).flatten()
    tail = (relative - 4).clamp(min=0).sum() + 1e-3
    for name, expected in (("l1", weight.abs().sum()), ("peak", torch.tensor(1.0)), ("l1_tail", tail)):
        torch.testing.assert_close(CRITERIA[name].score(alone), expected.view(1))
    assert CRITERIA["random"].score(alone).shape == (1,)


@pytest.mark.parametrize("piece", [1, 13, 60, 2**19])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (2, 3, 0, 1), (3, 1, 0, 2), (1, 2, 3, 0)])
@pytest.mark.parametrize("shape", [(5, 3, 4, 7), (5, 1, 4, 1), (1, 3, 1, 7), (2, 3, 4, 2), (1, 1, 1, 1)])
def test_sums_over_places_are_made_of_small_pieces_of_memory_that_is_read_in_one_go(shape, order, piece, monkeypatch):
    monkeypatch.setattr("hf_slim.pruning.importance.criteria.PIECE", piece)
    weight, gradient = (draw(*shape, seed=seed).permute(order) for seed in (1, 2))
    sizes = []

    def square(product: Tensor) -> Tensor:
        assert product.is_contiguous()
        sizes.append(product.numel())
        return product.square_()

    for factors in ((weight, gradient), (weight,)):
        found = place_sums(square, *factors)
        expected = torch.stack([factor.double() for factor in factors]).prod(0).square().sum((2, 3))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
        smallest = weight.numel() // max([size for size in shape if size > 1][:1], default=1)
        assert max(sizes) <= max(piece, smallest)  # no more at once than was asked for, or than lies in one row
        assert 2 * min(sizes[:-1], default=piece) >= min(piece, smallest)  # and not much less
        assert sum(sizes) == weight.numel()
        sizes.clear()
