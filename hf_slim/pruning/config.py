"""Settings of pruning: how much structure is removed, and when."""

from dataclasses import dataclass, field
from functools import cached_property

from hf_slim.core.config import SlimConfig, require_share, require_whole
from hf_slim.core.errors import SlimConfigError, nearest
from hf_slim.core.schedule import SCHEDULES
from hf_slim.pruning.importance.criteria import CRITERIA

KINDS = (
    "ffn", "kv_heads", "heads", "channels", "experts", "hidden", "layers", "attention_blocks", "ffn_blocks",
)  # fmt: skip
MEASURES = ("parameters", "macs", "latency")
# the best ones on SmolLM2 and MiniLM (recipes/benchmarks/pruning_criteria.py); taylor for kinds that neither has
DEFAULT_CRITERIA = dict.fromkeys(KINDS, "taylor") | {
    "ffn": "fisher_mask", "kv_heads": "fisher_mask", "heads": "fisher_mask", "layers": "angular",
    "attention_blocks": "taylor_sum", "ffn_blocks": "l2_tail",
}  # fmt: skip
SHARED_CRITERION = "fisher_mask"  # for a target that is spent on several kinds
SPEND_ON = ("ffn", "kv_heads", "channels")
# kinds that overlap, so one target cannot be spent on both
OVERLAPPING = {
    "layers": ("ffn", "kv_heads", "heads", "channels", "experts", "attention_blocks", "ffn_blocks"),
    "heads": ("kv_heads",),
    "attention_blocks": ("kv_heads", "heads"),
    "ffn_blocks": ("ffn",),
}


@dataclass(frozen=True)
class PruningConfig(SlimConfig):
    """How much structure to remove, and when. Progress is the share of optimizer steps done, in [0, 1].

    Kinds of structure: `ffn`: neurons of feed-forward layers and of fused experts. `kv_heads`: key-value heads with
    the query heads that use them. `heads`: query heads, the same number from every key-value head; in multi-head
    attention both kinds mean the attention heads. `channels`: channels between convolutions. `experts`: whole experts
    of a mixture. `hidden`: channels of the residual stream. `layers`: whole layers of a stack. `attention_blocks` and
    `ffn_blocks`: the attention part or the feed-forward part of a layer.
    """

    sparsity: dict[str, float] | float | None = field(default=None, metadata={"keys": KINDS})
    """Share of the groups that is removed by the end, in [0, 1), for each kind of structure: `{ffn: 0.5, heads:
    0.25}`. One number means that share of `ffn` and of `kv_heads`. `null` without a `target` means `{ffn: 0.5}`."""

    target: dict[str, float] | None = field(default=None, metadata={"keys": MEASURES})
    """Size that the stacked layers may have at the end, as a share in (0, 1) of one measure, such as `{parameters:
    0.6}`; set it instead of `sparsity`. `macs` are multiply-adds per token, or per picture or sound if the model reads
    these; `latency` is time measured on the device of the run. Embeddings and output head do not count. The groups of
    `spend_on` with the least importance per saving are removed. `null`: `sparsity` sets the amount."""

    spend_on: list[str] = field(default_factory=lambda: list(SPEND_ON), metadata={"choices": KINDS})
    """Kinds of structure that a `target` may remove; kinds that the model does not have are skipped. With more than
    one kind, their scores are compared, so all of them use one criterion."""

    uniform: dict[str, bool] | bool = field(default=True, metadata={"keys": KINDS})
    """`true`: the same number of groups is removed from every layer, one that the model's config accepts; the result
    is an ordinary checkpoint. `false`: the least important groups of the whole model are removed, so layers may differ
    in size, and loading needs hf_slim. A mapping sets it for each kind; kinds that it leaves out are `true`."""

    criterion: dict[str, str] | str | None = field(default=None, metadata={"choices": CRITERIA, "keys": KINDS})
    """How the importance of a group is measured: one registered criterion for all kinds, or a mapping with one for
    each kind. `null`: the default of each kind, and `fisher_mask` for a `target` that is spent on several kinds."""

    schedule: str = field(default="cubic", metadata={"choices": SCHEDULES})
    """How the removed share grows from 0 at `start` to its full amount at `stop`: a registered schedule. `cubic`
    removes most at the beginning and leaves steps to recover."""

    start: float = 0.05
    """Progress of training (share of the optimizer steps done) up to which nothing is removed, in [0, 1]; not above
    `stop`."""

    stop: float = 0.5
    """Progress of training from which nothing more is removed, in (0, 1]; the steps after it let the model recover."""

    rounds: int = 4
    """How many times the schedule `staged` removes groups, a whole number of at least 2; other schedules ignore it."""

    every: int = 1
    """Optimizer steps between two removals, a whole number of at least 1; 1 checks after every step."""

    regrow: bool = False
    """Whether groups that are zeroed may become active again before `stop`, when other groups have become less
    important. `false`: a group that is zeroed stays zero."""

    calibration_batches: int = 0
    """Training batches from which scores are computed before the first step, a whole number of at least 0. Above 0,
    everything is removed before training starts (one shot); 0 removes gradually while training."""

    repair: bool = False
    """Whether the layers that read the removed groups are corrected by least squares on the calibration batches, so
    that their outputs change as little as possible. Needs `calibration_batches` above 0."""

    round_to: dict[str, int] = field(default_factory=dict, metadata={"keys": KINDS})
    """A number, for each kind, of which the groups left in every layer must be a multiple, such as `{ffn: 32}`: fast
    kernels need such sizes. Empty: any number may be left."""

    floor: float = 0.0
    """Share of its groups that every layer keeps at least, in [0, 1); 0 sets no lower limit beyond what the model
    needs to run."""

    ignore: list[str] = field(default_factory=list)
    """Patterns, with `*` as wildcard, of group set names as `hf-slim inspect` prints them, such as `*.0.*`; the groups
    of matching sets are kept. A pattern that matches nothing is an error."""

    def __post_init__(self) -> None:
        self._check_amounts()
        for kind, value in self.uniform_by_kind.items():
            if not isinstance(value, bool):
                raise SlimConfigError(f"`uniform.{kind}` must be true or false, got {value!r}.")
        self._check_criterion()
        SCHEDULES[self.schedule]
        require_share("start", self.start)
        require_share("stop", self.stop)
        require_share("floor", self.floor, upper_open=True)
        if not self.start <= self.stop or not self.stop:
            raise SlimConfigError(
                f"`start` must not be after `stop`, and `stop` not 0: got {self.start} and {self.stop}."
            )
        for name, value in {"every": self.every, **{f"round_to.{k}": v for k, v in self.round_to.items()}}.items():
            require_whole(name, value)
        require_whole("rounds", self.rounds, least=2, hint="One round is schedule one_shot.")
        require_whole("calibration_batches", self.calibration_batches, least=0)
        if self.repair and not self.calibration_batches:
            raise SlimConfigError(
                "`repair` needs activations of calibration batches: set `calibration_batches`, such as 48."
            )
        for kind in self.round_to:
            _require_kind("round_to", kind)

    def _check_criterion(self) -> None:
        chosen = self.criterion_by_kind
        for name in chosen.values():
            CRITERIA[name]
        if self._shares_scores and len({chosen[kind] for kind in self.spend_on}) > 1:
            raise SlimConfigError(
                f"A target that is spent on {', '.join(self.spend_on)} compares their scores, so it needs one "
                f"criterion for all of them, got {self.criterion}."
            )

    def _check_amounts(self) -> None:
        if self.target is not None:
            if self.sparsity is not None:
                raise SlimConfigError("`sparsity` and `target` both set how much is removed. Set only one of them.")
            if len(self.target) != 1 or not set(self.target) <= set(MEASURES):
                raise SlimConfigError(f"`target` must name one of {', '.join(MEASURES)}, got {self.target!r}.")
            share = next(iter(self.target.values()))
            require_share("target", share, upper_open=True)
            if not share:
                raise SlimConfigError("`target` 0 would keep nothing. It is the share that is kept, such as 0.6.")
            self._check_spend_on()
            return
        for kind, share in self.sparsity_by_kind.items():
            require_share(f"sparsity.{kind}", share, upper_open=True)
        if not any(self.sparsity_by_kind.values()):
            raise SlimConfigError(
                f"`sparsity` is 0 for every kind: nothing would be removed. Set one of {', '.join(KINDS)}."
            )

    def _check_spend_on(self) -> None:
        for kind in self.spend_on:
            _require_kind("spend_on", kind)
        for kind, others in OVERLAPPING.items():
            clash = [other for other in self.spend_on if other in others]
            if kind in self.spend_on and clash:
                raise SlimConfigError(
                    f"`spend_on` names {kind} and {', '.join(clash)}, which overlap: their savings cannot be added. "
                    "Name one of them, and prune the other in a separate run."
                )

    @cached_property
    def sparsity_by_kind(self) -> dict[str, float]:
        """Share of groups removed at the end for each of `KINDS`, in [0, 1); without a target."""
        given = {"ffn": 0.5} if self.sparsity is None else self.sparsity
        return _per_kind("sparsity", given if isinstance(given, dict) else {"ffn": given, "kv_heads": given}, 0.0)

    @cached_property
    def uniform_by_kind(self) -> dict[str, bool]:
        """`uniform` for each of `KINDS`."""
        return _per_kind("uniform", self.uniform, default=True)

    @cached_property
    def criterion_by_kind(self) -> dict[str, str]:
        """The criterion that scores groups of each of `KINDS`."""
        default = dict.fromkeys(KINDS, SHARED_CRITERION) if self._shares_scores else DEFAULT_CRITERIA
        chosen = default if self.criterion is None else _per_kind("criterion", self.criterion, None)
        return {kind: chosen[kind] or default[kind] for kind in KINDS}

    @property
    def _shares_scores(self) -> bool:
        """Whether the scores of several kinds are compared with each other."""
        return self.target is not None and len(self.spend_on) > 1

    @property
    def is_timed(self) -> bool:
        """Whether the target is a share of measured time."""
        return bool(self.target) and "latency" in self.target

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of structure of which groups are removed."""
        if self.target is not None:
            return tuple(self.spend_on)
        return tuple(kind for kind, share in self.sparsity_by_kind.items() if share)


def _per_kind(name: str, value: object, default: object) -> dict:
    if not isinstance(value, dict):
        return dict.fromkeys(KINDS, value)
    for kind in value:
        _require_kind(name, kind)
    return {kind: value.get(kind, default) for kind in KINDS}


def _require_kind(name: str, kind: object) -> None:
    if kind not in KINDS:
        raise SlimConfigError(f"`{name}` has no kind '{kind}'. {nearest(str(kind), KINDS)}")
