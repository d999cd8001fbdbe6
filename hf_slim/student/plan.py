"""Plans how many groups of every group set a student keeps, from its shape."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from hf_slim.core.errors import SlimConfigError, SlimError, nearest
from hf_slim.pruning.groups import GroupSet
from hf_slim.pruning.structure.find import UNSTACKED
from hf_slim.student.cut import Cut, accepts
from hf_slim.student.shape import StudentShape
from hf_slim.student.structure import Structure, structure_of

NEAR = 8  # values of each width that are tried to find shapes that a config accepts
NAMED = 6  # alternatives that an error message names


def plan_student(structure: Structure, shape: StudentShape) -> list[Cut]:
    """Plans how many groups of every group set are kept; weights are not needed.

    Args:
        structure: Structure of the teacher.
        shape: Layers and widths of the student.
    Raises: SlimConfigError: if the shape is impossible for this teacher; the message names possible shapes.
    """
    cuts = _cuts(structure, shape)
    if not accepts(structure, cuts, shape):
        config, name = structure.config, type(structure.twin.config).__name__
        widths = ", ".join(f"{width} {value}" for width, value in shape.widths.items() if value)
        if not widths:
            raise SlimConfigError(
                f"{name} cannot describe the kept layers, because they are of different kinds. Choose other layers."
            )
        raise SlimConfigError(
            f"No {name} describes a student with {widths}, cut from a teacher with hidden {config.hidden_size} and "
            f"heads {config.num_attention_heads}. Possible with the other settings: "
            f"{'; '.join(_legal_near(structure, shape)) or 'nothing near it'}."
        )
    return cuts


def _legal_near(structure: Structure, shape: StudentShape) -> list[str]:
    """Hidden widths and numbers of heads near the requested ones that the config accepts, as text."""
    legal, own = [], (structure.config.hidden_size, structure.config.num_attention_heads)
    try:
        whole = structure_of(structure.twin, replace(shape, hidden=own[0], heads=own[1]))
        candidates = [pair for pair in dict.fromkeys(_candidates(whole, shape)) if pair != own]
    except SlimError:  # heads or hidden width of this teacher cannot change
        return []
    for hidden, heads in candidates:
        changed = replace(shape, hidden=hidden, heads=heads)
        try:
            if accepts(whole, _cuts(whole, changed), changed):
                legal.append(f"hidden {hidden} with heads {heads}")
        except SlimError:
            continue
        if len(legal) == NAMED:
            break
    return legal


def _candidates(structure: Structure, shape: StudentShape) -> Iterator[tuple[int, int]]:
    """(hidden, heads): other numbers of heads, other widths, then both with heads as wide as the teacher's."""
    width, count = structure.config.hidden_size, structure.config.num_attention_heads
    hidden, heads = shape.hidden or width, shape.heads or count
    groups = structure.of("kv_heads")
    step = count // groups[0].count if groups else 1
    numbers = range(step, count + 1, step)
    yield from ((hidden, number) for number in _nearest(numbers, heads))
    if shape.hidden:
        yield from ((near, heads) for near in _nearest(range(heads, width + 1, heads), hidden))
    size = width // count
    sought = hidden // size if shape.hidden else heads
    yield from ((number * size, number) for number in _nearest(numbers, sought))


def _nearest(numbers: Iterable[int], wanted: int) -> list[int]:
    return sorted(numbers, key=lambda number: abs(number - wanted))[:NEAR]


def _cuts(structure: Structure, shape: StudentShape) -> list[Cut]:
    layers = _layer_cuts(structure, shape) if shape.layers is not None or shape.keep is not None else []
    return [*layers, *_hidden_cuts(structure, shape), *_head_cuts(structure, shape), *_ffn_cuts(structure, shape)]


def _layer_cuts(structure: Structure, shape: StudentShape) -> list[Cut]:
    stacks = _required(structure, "layers", "layers")
    settings = shape.per_stack(shape.layers if shape.keep is None else shape.keep)
    for name in settings:
        if name and not any(_is_called(stack, name) for stack in stacks):
            raise SlimConfigError(
                f"The teacher has no stack '{name}' of layers. {nearest(name, [found.stack for found in stacks])}"
            )
    cuts = []
    for stack in stacks:
        for value in (value for name, value in settings.items() if _is_called(stack, name)):
            number = max(1, round(value * stack.count)) if shape.keep is not None else len(value)
            kept = value if shape.keep is None else None
            _check_layers(stack, kept or [*stack.pinned])
            cuts.append(Cut(stack, number, kept))
    return cuts


def _is_called(stack: GroupSet, name: str) -> bool:
    return name in ("", stack.stack, *stack.stack.split("."))


def _check_layers(stack: GroupSet, kept: list[int]) -> None:
    outside = [index for index in kept if not 0 <= index < stack.count]
    if outside:
        raise SlimConfigError(
            f"'{stack.stack}' has no layer {outside[0]}: its {stack.count} layers have numbers 0 to {stack.count - 1}."
        )
    missing = [index for index in stack.pinned if index not in kept]
    if missing:
        raise SlimConfigError(
            f"Layer {missing[0]} of '{stack.stack}' must be kept, because the others use its output."
        )


def _hidden_cuts(structure: Structure, shape: StudentShape) -> list[Cut]:
    if shape.hidden is None:
        return []
    sets = [found for found in _required(structure, "hidden", "hidden") if "hidden_size" in found.config_fields]
    follow = [found for found in structure.of(UNSTACKED) for hidden in sets if found.count == hidden.count]
    return [_cut("hidden", found, shape.hidden) for found in (*sets, *follow)]


def _head_cuts(structure: Structure, shape: StudentShape) -> list[Cut]:
    if shape.heads is None:
        return []
    kind = "kv_heads" if structure.of("kv_heads") else "heads"  # a single key-value head for all queries is kept
    sets = _required(structure, "heads", kind)
    return [_cut("heads", found, shape.heads, per_group=_queries(structure, found)) for found in sets]


def _queries(structure: Structure, group_set: GroupSet) -> int:
    """Query heads per group."""
    counts_queries = "num_attention_heads" in group_set.config_fields
    return structure.config.num_attention_heads // group_set.count if counts_queries else 1


def _ffn_cuts(structure: Structure, shape: StudentShape) -> list[Cut]:
    if shape.ffn is None:
        return []
    sets = _required(structure, "ffn", "ffn")
    widths = sorted({found.count for found in sets})
    if len(widths) > 1:
        raise SlimConfigError(
            f"The feed-forward layers of this teacher have {' and '.join(map(str, widths))} neurons, but `ffn` is one "
            "number for all. Remove it, and prune them by `sparsity: {ffn: ...}` instead."
        )
    return [_cut("ffn", found, shape.ffn) for found in sets]


def _cut(name: str, group_set: GroupSet, value: int, per_group: int = 1) -> Cut:
    have, step = group_set.count * per_group, group_set.multiple * per_group
    if value > have:
        raise SlimConfigError(f"`{name}` {value} is more than the {have} of the teacher. Use at most {have}.")
    if value % step:
        legal = ", ".join(str(number) for number in range(max(step, value // step * step), have + 1, step)[:NAMED])
        raise SlimConfigError(
            f"`{name}` must be a multiple of {step} for this teacher, got {value}. Possible: {legal}, ..."
        )
    return Cut(group_set, value // per_group)


def _required(structure: Structure, name: str, kind: str) -> list[GroupSet]:
    sets = structure.of(kind)
    if not sets:
        reasons = [refusal.reason for refusal in structure.refusals if refusal.kind == kind]
        raise SlimConfigError(
            f"`{name}` cannot change in this teacher. {'; '.join(reasons[:3]) or 'No such groups can be removed'}."
        )
    return sets
