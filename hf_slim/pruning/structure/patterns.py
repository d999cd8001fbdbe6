"""Regular patterns in the inputs of a layer: heads, neurons and channels, found from gradients of a probe."""

from dataclasses import dataclass, field

from hf_slim.pruning.structure.probe import Dependence, Output, Probe, Reading

SAMPLES = 8  # groups whose channels are checked one by one; the others are inferred from the pattern
Run = tuple[int, int]  # start, length
Place = tuple[Output, int]  # a channel of an output


@dataclass(eq=False)
class Pattern:
    """How the input channels of a layer are divided into groups.

    Attributes:
        reading: The input of the layer.
        block: Number of channels of the smallest unit: 1 for neurons, the size of a head for attention.
        per_group: Number of blocks that depend on each other: the query heads of one key-value head.
        rows: Output -> runs of its channels for the first group; those of group i are shifted by i times the length.
        own_rows: The same for the first block, without channels that other blocks use too.
        is_shared: Whether all blocks depend on some common outputs, such as the only key and value head.
        reason: The reason why the groups cannot be pruned; empty: they can.
    """

    reading: Reading
    block: int = 1
    per_group: int = 1
    rows: dict[Output, list[Run]] = field(default_factory=dict)
    own_rows: dict[Output, list[Run]] = field(default_factory=dict)
    is_shared: bool = False
    reason: str = ""

    @property
    def blocks(self) -> int:
        """Number of blocks of channels that the layer reads."""
        return self.reading.channels // self.block

    @property
    def count(self) -> int:
        """Number of groups."""
        return self.blocks // self.per_group


def find_pattern(probe: Probe, reading: Reading) -> Pattern | None:
    """The pattern in the input of a layer; None if the input is the residual stream, or data.

    If the input depends on all channels of some outputs, these are marked as the residual stream.
    """
    first = probe.depends_on(reading, 0)
    if not first or reading.channels < 2:
        return None
    if all(len(channels) == output.channels for output, channels in first.items()):
        for output in first:
            output.is_stream = True
        return None
    pattern = Pattern(reading, _block_size(probe, reading, _places(first)))
    if reading.channels % pattern.block:
        return _refused(pattern, f"its {reading.channels} inputs cannot be divided into blocks of {pattern.block}")
    blocks = _Blocks(probe, pattern)
    shared = blocks[0] & blocks[pattern.blocks - 1] if pattern.blocks > 1 else set()
    if pattern.blocks == 1 or shared == blocks[0]:
        pattern.rows = _runs(blocks[0])
        return _refused(
            pattern, "all its inputs depend on each other, as after a single head or a norm over all heads"
        )
    pattern.is_shared = bool(shared)
    pattern.per_group = _connected(blocks, pattern.blocks, shared)
    if pattern.blocks % pattern.per_group:
        return _refused(pattern, f"its {pattern.blocks} blocks cannot be divided into groups of {pattern.per_group}")
    members = _group(blocks, pattern.per_group, 0) - shared
    pattern.rows = _runs(members)
    if pattern.per_group > 1 or shared:
        others = blocks[1 if pattern.per_group > 1 else pattern.blocks - 1]
        pattern.own_rows = _runs(blocks[0] - shared - others)
    if not _repeats(pattern, blocks, shared):
        return _refused(pattern, "the outputs it depends on are not the same for every group, shifted by its index")
    return pattern


def _repeats(pattern: Pattern, blocks: "_Blocks", shared: set) -> bool:
    """Whether every group depends on the same outputs as the first one, shifted by its index."""
    ends = (
        (output, start + pattern.count * length) for output, runs in pattern.rows.items() for start, length in runs
    )
    if any(end > output.channels for output, end in ends):
        return False
    return all(
        _group(blocks, pattern.per_group, index) - shared == _shifted(pattern.rows, index)
        for index in _sample(pattern.count)
    )


class _Blocks:
    """Block index -> the channels of outputs that it depends on; each is computed once."""

    def __init__(self, probe: Probe, pattern: Pattern):
        self._probe, self._pattern = probe, pattern
        self._known: dict[int, set[Place]] = {}

    def __getitem__(self, index: int) -> set[Place]:
        if index not in self._known:
            size = self._pattern.block
            found = self._probe.depends_on(self._pattern.reading, index * size, size)
            self._known[index] = _places(found)
        return self._known[index]


def _places(dependence: Dependence) -> set[Place]:
    return {(output, channel) for output, channels in dependence.items() for channel in channels}


def _block_size(probe: Probe, reading: Reading, first: set[Place]) -> int:
    """Number of channels in the first block: those that share as much with the first channel as the second does."""
    in_common = len(first & _places(probe.depends_on(reading, 1)))
    if not in_common:
        return 1
    low, high = 1, reading.channels  # channel `low` belongs to the block, channel `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        inside = len(first & _places(probe.depends_on(reading, middle))) >= in_common
        low, high = (middle, high) if inside else (low, middle)
    return high


def _connected(blocks: _Blocks, count: int, shared: set[Place]) -> int:
    """Number of blocks from the start that share outputs with the first one, apart from outputs that all share."""
    connected = 1
    while connected < count and (blocks[connected] & blocks[0]) - shared:
        connected += 1
    return connected


def _group(blocks: _Blocks, per_group: int, index: int) -> set[Place]:
    return set().union(*(blocks[index * per_group + inner] for inner in range(per_group)))


def _runs(places: set[Place]) -> dict[Output, list[Run]]:
    runs: dict[Output, list[Run]] = {}
    for output, channel in sorted(places, key=lambda place: (place[0].layer, place[1])):
        known = runs.setdefault(output, [])
        if known and sum(known[-1]) == channel:
            known[-1] = (known[-1][0], known[-1][1] + 1)
        else:
            known.append((channel, 1))
    return runs


def _shifted(rows: dict[Output, list[Run]], index: int) -> set[Place]:
    return {
        (output, start + index * length + inner)
        for output, runs in rows.items()
        for start, length in runs
        for inner in range(length)
    }


def _sample(count: int) -> list[int]:
    """Indices spread over `range(count)`, with the first and the last one."""
    if count <= SAMPLES:
        return list(range(count))
    return sorted({0, 1, count - 1, *((count * step // SAMPLES + step) % count for step in range(1, SAMPLES - 1))})


def _refused(pattern: Pattern, reason: str) -> Pattern:
    pattern.reason = f"'{pattern.reading.layer}' was not understood: {reason}"
    return pattern
