"""Finds the attributes of modules and configs with sizes that become smaller when groups are removed.

The candidates are verified as in `proof`: removing groups must give the same result as zeroing them.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from hf_slim.core.host import config_of, config_value
from hf_slim.pruning.groups import GroupSet, Refusal, common_ancestor
from hf_slim.pruning.structure.probe import Probe
from hf_slim.pruning.structure.proof import _difference

HEAD_COUNTS = ("num_attention_heads", "num_heads", "num_key_value_heads", "num_kv_heads", "n_heads", "n_head")
RATIOS = ("num_key_value_groups",)  # query heads per key-value head: changes only with the query heads
WIDTHS = ("intermediate_size", "intermediate_dim", "all_head_size", "inner_dim", "split_size")
CONFIG_WIDTHS = (
    "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "hidden_dim", "encoder_ffn_dim",
    "decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size",
)  # fmt: skip
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
HIDDEN_WIDTHS = ("hidden_dim", "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim")
AMBIGUOUS_WIDTHS = ("embed_dim", "hidden_size", "dim")  # the width of all heads or of the stream; both are tried

COUNTED = {"experts": EXPERT_COUNTS, "hidden": HIDDEN_WIDTHS}  # kinds for which modules store the number of groups


def with_sizes(twin: nn.Module, probe: Probe, found: list[GroupSet]) -> tuple[list[GroupSet], list[Refusal]]:
    """`found` with the attributes that become smaller, and reasons for sets whose removal would change the function.

    Sets that can only change together are merged: in T5, every layer passes a position bias per head to the next one.
    """
    checked, failed = [], []
    for kind in dict.fromkeys(group_set.kind for group_set in found):
        alike = [group_set for group_set in found if group_set.kind == kind]
        together, _ = _first_equal(twin, probe, alike)
        if together:
            checked += together
            continue
        dependent = []
        for group_set in alike:  # finds the sets that can be removed separately
            alone, _ = _first_equal(twin, probe, [group_set])
            checked += alone
            dependent += [group_set] * (not alone)
        for count in dict.fromkeys(group_set.count for group_set in dependent):
            members = [group_set for group_set in dependent if group_set.count == count]
            merged, difference = _first_equal(twin, probe, [_merged(members)])
            checked += merged
            reasons = (f"'{group_set.name}' was not understood: {difference}" for group_set in members if difference)
            failed += [Refusal(kind, reason) for reason in reasons]
    order = {group_set.name: index for index, group_set in enumerate(found)}
    return sorted(checked, key=lambda group_set: order.get(group_set.name, len(order))), failed


def _merged(sets: list[GroupSet]) -> GroupSet:
    if len(sets) == 1:
        return sets[0]
    slices = sorted((part for group_set in sets for part in group_set.slices), key=lambda part: part.reads)
    layer = common_ancestor([group_set.name for group_set in sets])
    return replace(sets[0], name=f"{layer}/{sets[0].kind}", slices=tuple(slices))


def _first_equal(twin: nn.Module, probe: Probe, sets: list[GroupSet]) -> tuple[list[GroupSet], str]:
    difference = ""
    for ambiguous, configs in ((False, False), (True, False), (False, True), (True, True)):
        candidates = [
            replace(
                group_set,
                attributes=tuple(_attributes(twin, group_set, ambiguous, configs)),
                config_fields=tuple(_config_fields(twin, group_set)),
            )
            for group_set in sets
        ]
        difference = _difference(twin, probe, candidates)
        if not difference:
            return candidates, ""
    return [], difference


def _attributes(twin: nn.Module, group_set: GroupSet, ambiguous: bool, configs: bool) -> Iterator[tuple[str, str]]:
    if group_set.kind in COUNTED:
        names = COUNTED[group_set.kind][: 1 if ambiguous else None]
        paths = [path for path, _ in twin.named_modules()]
        if group_set.kind == "experts":
            own = dict.fromkeys(part.module for part in group_set.slices)
            paths = list(dict.fromkeys((*own, *(path.rpartition(".")[0] for path in own))))
        held = ((path, name) for path in paths for name in names)
        yield from ((path, name) for path, name in held if vars(twin.get_submodule(path)).get(name) == group_set.count)
        return
    total = _total(group_set)
    names = WIDTHS + (AMBIGUOUS_WIDTHS if ambiguous else ())
    for path in dict.fromkeys(part.module.rpartition(".")[0] for part in group_set.slices):
        owner = twin.get_submodule(path)
        yield from ((path, name) for name in _shrinking(vars(owner), group_set, total, names))
        if configs and config_of(owner) is not None:
            fields = {name: config_value(owner, name) for name in (*HEAD_COUNTS, *names)}
            yield from ((path, f"config.{name}") for name in _shrinking(fields, group_set, total, names))


def _config_fields(twin: nn.Module, group_set: GroupSet) -> Iterator[str]:
    """Candidate fields; they are written only if a model that is built from the config has the right shapes."""
    if config_of(twin) is None:
        return
    names = COUNTED.get(group_set.kind, (*HEAD_COUNTS, *CONFIG_WIDTHS))
    fields = {name: config_value(twin, name) for name in names}
    if group_set.kind in COUNTED:
        yield from (name for name, value in fields.items() if value == group_set.count)
        return
    widths = () if group_set.kind in ("heads", "kv_heads") else CONFIG_WIDTHS  # one may equal the other by chance
    yield from _shrinking(fields, group_set, _total(group_set), widths)
    if group_set.kind == "ffn" and "n_inner" in vars(twin.config) and twin.config.n_inner is None:
        yield "n_inner"  # in GPT-2, None means four times the width of the stream


def _total(group_set: GroupSet) -> int:
    """Number of columns that read the whole set."""
    return max((group_set.count * part.width for part in group_set.slices if part.reads), default=0)


def _shrinking(values: dict, group_set: GroupSet, total: int, widths: tuple[str, ...]) -> Iterator[str]:
    for name, value in values.items():
        if type(value) is not int or not value:
            continue
        counts_heads = group_set.kind in ("heads", "kv_heads") and name in HEAD_COUNTS and value % group_set.count == 0
        is_ratio = group_set.balance is not None and name in RATIOS and value == group_set.balance
        if counts_heads or is_ratio or (name in widths and value == total):
            yield name
