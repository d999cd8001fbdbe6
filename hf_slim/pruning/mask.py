"""Which groups go, and keeping them at zero until they are removed."""

import torch
from torch import Tensor, nn

from hf_slim.core.errors import SlimError
from hf_slim.core.schedule import scheduled
from hf_slim.pruning.config import PruningConfig
from hf_slim.pruning.groups import GroupSet, bias_blocks, weight_blocks

Removed = dict[str, list[int]]


def final_counts(group_sets: list[GroupSet], config: PruningConfig) -> dict[str, dict[str, int] | int]:
    """How many groups go in the end: `{kind: {layer: n}}` for a uniform kind, `{kind: n}` in total otherwise.

    Raises: SlimError: if the model has no such structure, or the share is too small to remove a whole group.
    """
    targets: dict[str, dict[str, int] | int] = {}
    for kind, share in config.sparsity.items():
        counts = {group_set.name: group_set.count for group_set in group_sets if group_set.kind == kind}
        if not share:
            continue
        if not counts:
            raise SlimError(
                f"`sparsity.{kind}` is {share}, but no layer of this model was recognised as {kind}. Set it to 0; "
                "known layer names are in hf_slim/pruning/architectures.py."
            )
        if config.uniform[kind]:
            targets[kind] = {name: min(round(share * count), count - 1) for name, count in counts.items()}
            removes = max(targets[kind].values())
        else:
            # every layer keeps one group
            targets[kind] = removes = min(round(share * sum(counts.values())), sum(counts.values()) - len(counts))
        if not removes:
            smallest = min(counts.values())
            raise SlimError(
                f"`sparsity.{kind}` {share} removes nothing: a layer has {smallest} groups. Use at least "
                f"{1 / smallest:.2g}, or `uniform: {{{kind}: false}}` to choose across all layers."
            )
    return targets


def choose_removed(
    group_sets: list[GroupSet], scores: dict[str, Tensor], removed: Removed, config: PruningConfig, progress: float
) -> Removed:
    """The groups that are to be zero at this progress: those that are already, and the least important others.

    Args:
        scores: Group set name -> `(count,)`, higher is dearer.
        removed: What has gone so far; it never comes back.
        progress: Share of training done, in [0, 1].
    Returns: group set name -> sorted indices. Ties go to the lower index, so that all ranks choose alike.
    """
    fraction = scheduled(config.schedule, progress, config.start, config.stop)
    chosen = {name: list(indices) for name, indices in removed.items()}
    for kind, target in final_counts(group_sets, config).items():
        sets = [group_set for group_set in group_sets if group_set.kind == kind]
        if isinstance(target, dict):
            for group_set in sets:
                _choose([group_set], scores, chosen, int(target[group_set.name] * fraction))
        else:
            _choose(sets, scores, chosen, int(target * fraction))
    return chosen


def _choose(sets: list[GroupSet], scores: dict[str, Tensor], chosen: Removed, target: int) -> None:
    missing = target - sum(len(chosen.get(group_set.name, ())) for group_set in sets)
    if missing <= 0:
        return
    candidates = []
    for group_set in sets:
        score = scores[group_set.name].detach().float().cpu().clone()
        gone = chosen.get(group_set.name, [])
        score[gone] = -torch.inf
        score[score.argmax()] = torch.inf  # the best group of a layer always stays
        score[gone] = torch.inf
        candidates.append(score)
    order = torch.cat(candidates).sort(stable=True).indices[:missing].tolist()
    offsets = [0]
    for group_set in sets:
        offsets.append(offsets[-1] + group_set.count)
    for group_set, start, end in zip(sets, offsets[:-1], offsets[1:], strict=True):
        new = [index - start for index in order if start <= index < end]
        if new:
            chosen[group_set.name] = sorted(chosen.get(group_set.name, []) + new)


def zero_groups_(model: nn.Module, group_sets: list[GroupSet], removed: Removed) -> None:
    """Sets every weight and bias of the removed groups to zero, so that they no longer act."""
    for group_set in group_sets:
        if group_set.name in removed:
            indices = removed[group_set.name]
            for block in weight_blocks(model, group_set) + bias_blocks(model, group_set):
                block[indices] = 0


def mark_kept_columns_(model: nn.Module, group_sets: list[GroupSet], removed: Removed) -> None:
    """Tells every consuming layer which of its columns will remain, as `kept_columns`.

    A quantization grid that groups columns must group them as the smaller layer will.
    """
    for group_set in group_sets:
        consumer = group_set.slices[-1]
        layer = model.get_submodule(consumer.module)
        kept = kept_indices(group_set.count, removed.get(group_set.name, []), consumer.width, layer.weight.device)
        layer.kept_columns = kept if group_set.name in removed else None


def kept_indices(count: int, removed: list[int], width: int, device: torch.device) -> Tensor:
    """Rows or columns that remain when groups of `width` go."""
    stays = torch.ones(count, dtype=torch.bool, device=device)
    stays[removed] = False
    return stays.repeat_interleave(width).nonzero().squeeze(1)
