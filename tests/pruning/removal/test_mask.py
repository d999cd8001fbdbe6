"""What a mask zeroes, and which columns it says will be left, place by place."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_slim.pruning.groups import GroupSet, Slice
from hf_slim.pruning.removal.mask import mark_kept_columns_, zero_groups_


class Experts(nn.Module):
    """Fused weights of three experts, whose last dimension is what they read."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 5))
        self.down = nn.Parameter(torch.randn(3, 5, 8))


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "up": nn.Linear(6, 8), "down": nn.Linear(8, 5), "one": nn.Linear(1, 1, bias=False),
        "conv": nn.Conv2d(4, 1, 3), "gpt": Conv1D(5, 8), "words": nn.Embedding(7, 8), "experts": Experts(),
    }  # fmt: skip
    return nn.ModuleDict(layers)


def slices(*described: tuple, **more: object) -> tuple[Slice, ...]:
    return tuple(Slice(tensor, dim, width, offset, reads, **more) for tensor, dim, width, offset, reads in described)


SETS = [
    GroupSet("pairs", "ffn", 3, slices(("up.weight", 0, 2, 1, False), ("up.bias", 0, 2, 1, False),
                                       ("down.weight", 1, 2, 1, True))),
    GroupSet("maps", "channels", 4, slices(("conv.weight", 1, 1, 0, True))),
    GroupSet("inputs", "hidden", 8, slices(("gpt.weight", 0, 1, 0, True), ("words.weight", 1, 1, 0, False))),
    GroupSet("inner", "ffn", 4, slices(("experts.up", 1, 2, 0, False), ("experts.down", 2, 2, 0, True))),
    GroupSet("first", "heads", 1, slices(("down.weight", 1, 1, 0, True), ("one.weight", 1, 1, 0, True))),
]  # fmt: skip
REMOVED = {"pairs": [0, 2], "maps": [3], "inputs": [1, 2, 6], "inner": [1]}
# tensor -> (dimension, places that belong to the removed groups), counted by hand
GONE = {
    "up.weight": (0, [1, 2, 5, 6]), "up.bias": (0, [1, 2, 5, 6]), "down.weight": (1, [1, 2, 5, 6]),
    "conv.weight": (1, [3]), "gpt.weight": (0, [1, 2, 6]), "words.weight": (1, [1, 2, 6]),
    "experts.up": (1, [2, 3]), "experts.down": (2, [2, 3]),
}  # fmt: skip
READ = ("down.weight", "conv.weight", "gpt.weight", "experts.down")


def zeroed(tensor: Tensor, dim: int, places: list[int]) -> Tensor:
    return tensor.detach().clone().index_fill_(dim, torch.tensor(places), 0.0)


@pytest.mark.parametrize("readers_only", [False, True])
def test_removed_groups_are_zero_and_nothing_else_has_changed(readers_only):
    masked, whole = model(), dict(model().named_parameters())
    zero_groups_(masked, SETS, REMOVED, readers_only)
    for name, tensor in masked.named_parameters():
        if name in GONE and (name in READ or not readers_only):
            assert torch.equal(tensor, zeroed(whole[name], *GONE[name])), name
        else:
            assert torch.equal(tensor, whole[name]), name


def test_a_mask_is_of_writers_and_readers_unless_it_says_otherwise():
    one, other = model(), model()
    zero_groups_(one, SETS, REMOVED)
    zero_groups_(other, SETS, REMOVED, readers_only=False)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_layers_are_told_which_columns_will_be_left():
    marked = model()
    mark_kept_columns_(marked, SETS, REMOVED)
    taps = torch.arange(4 * 9).view(4, 9)
    expected = {
        "down": {"weight": [0, 3, 4, 7]}, "conv": {"weight": taps[:3].flatten().tolist()},
        "gpt": {"weight": [0, 3, 4, 5, 7]}, "words": {"weight": [0, 3, 4, 5, 7]},
        "experts": {"down": [0, 1, 4, 5, 6, 7]}, "one": None,
    }  # fmt: skip
    for name, kept in expected.items():
        found = marked[name].kept_columns
        assert (found if found is None else {key: places.tolist() for key, places in found.items()}) == kept, name
    assert not hasattr(marked["up"], "kept_columns")  # it loses rows


def test_several_sets_may_take_columns_of_one_layer():
    marked = model()
    mark_kept_columns_(marked, SETS, REMOVED | {"first": [0]})
    assert marked["down"].kept_columns["weight"].tolist() == [3, 4, 7]
    assert marked["one"].kept_columns["weight"].tolist() == []


def test_a_mask_that_is_lifted_leaves_all_columns():
    marked = model()
    mark_kept_columns_(marked, SETS, REMOVED)
    mark_kept_columns_(marked, SETS, {})
    assert all(marked[name].kept_columns is None for name in ("down", "conv", "gpt", "words", "experts", "one"))
