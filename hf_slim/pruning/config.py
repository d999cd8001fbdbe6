"""How much structure to remove, and when."""

from dataclasses import dataclass, field
from functools import cached_property

from hf_slim.core.config import SlimConfig, require_share
from hf_slim.core.errors import SlimError, nearest
from hf_slim.core.schedule import SCHEDULES
from hf_slim.pruning.importance.criteria import CRITERIA

KINDS = (
    "ffn", "kv_heads", "heads", "channels", "experts", "hidden", "layers", "attention_blocks", "ffn_blocks",
)  # fmt: skip
MEASURES = ("parameters", "macs", "latency")
# what measured best on SmolLM2 and MiniLM (recipes/benchmarks/pruning_criteria.py); taylor where neither has any
DEFAULT_CRITERIA = dict.fromkeys(KINDS, "taylor") | {
    "ffn": "fisher_mask", "kv_heads": "fisher_mask", "heads": "fisher_mask", "layers": "angular",
    "attention_blocks": "taylor_sum", "ffn_blocks": "l2_tail",
}  # fmt: skip
SHARED_CRITERION = "fisher_mask"  # for a target that is spent on several kinds
SPEND_ON = ("ffn", "kv_heads", "channels")
# no target is spent on both
APART = {
    "layers": ("ffn", "kv_heads", "heads", "channels", "experts", "attention_blocks", "ffn_blocks"),
    "heads": ("kv_heads",),
    "attention_blocks": ("kv_heads", "heads"),
    "ffn_blocks": ("ffn",),
}


@dataclass(frozen=True)
class PruningConfig(SlimConfig):
    """How much structure to remove, and when. Progress is the share of optimizer steps done, in [0, 1].

    Kinds of structure: `ffn` are the neurons of feed-forward layers and fused experts; `kv_heads` are key-value heads
    together with the query heads that read them; `heads` are query heads, the same number from every key-value head
    (in multi-head attention both are simply the heads); `channels` are those between convolutions; `experts` are whole
    experts of a mixture; `hidden` are channels of the residual stream; `layers` are whole layers of a stack,
    `attention_blocks` and `ffn_blocks` the attention or the feed-forward part of a layer.
    """

    sparsity: dict[str, float] | float | None = field(
        default=None,
        metadata={
            "help": "Share of groups removed at the end, in [0, 1), per kind; one number: of ffn and kv_heads. None "
            "without a target: {ffn: 0.5}."
        },
    )
    target: dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "Instead of `sparsity`: share of the parameters, macs or latency (measured on the device) of the "
            "layers, embeddings and head not counted, that stays, such as {parameters: 0.6}; spent on the kinds of "
            "`spend_on` where it costs least."
        },
    )
    spend_on: list[str] = field(
        default_factory=lambda: list(SPEND_ON),
        metadata={"help": f"Kinds that a target is spent on, those that the model has: {', '.join(SPEND_ON)}."},
    )
    uniform: dict[str, bool] | bool = field(
        default=True,
        metadata={
            "help": "Whether every layer loses the same number (a plain config), or the least important lose most."
        },
    )
    criterion: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": f"Importance of a group, for all kinds or per kind: {', '.join(CRITERIA)}. None: what measures "
            "best for the kind; for a target on several kinds fisher_mask."
        },
    )
    schedule: str = field(default="cubic", metadata={"help": f"How removal advances: {', '.join(SCHEDULES)}."})
    start: float = field(default=0.05, metadata={"help": "Progress before which nothing is removed, in [0, 1]."})
    stop: float = field(default=0.5, metadata={"help": "Progress after which nothing is removed, in (0, 1]."})
    rounds: int = field(
        default=4, metadata={"help": "How often schedule staged prunes, with training to recover between, from 2."}
    )
    every: int = field(default=1, metadata={"help": "Optimizer steps between two removals."})
    regrow: bool = field(
        default=False, metadata={"help": "Whether groups may come back before `stop` when others matter less by then."}
    )
    calibration_batches: int = field(
        default=0,
        metadata={"help": "Batches looked at before the first step, to remove everything then; 0: while training."},
    )
    repair: bool = field(
        default=False,
        metadata={"help": "Least-squares repair of the layers that read what went; needs `calibration_batches`."},
    )
    round_to: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "What is left per layer becomes a multiple of this, per kind, as fast kernels like it."},
    )
    floor: float = field(default=0.0, metadata={"help": "Share of its groups that every layer keeps, in [0, 1)."})
    ignore: list[str] = field(
        default_factory=list, metadata={"help": "Patterns of layer names that keep their groups, such as '*.0.*'."}
    )

    def __post_init__(self) -> None:
        self._check_amounts()
        for kind, value in self.uniform_by_kind.items():
            if not isinstance(value, bool):
                raise SlimError(f"`uniform.{kind}` must be true or false, got {value!r}.")
        self._check_criterion()
        SCHEDULES[self.schedule]
        require_share("start", self.start)
        require_share("stop", self.stop)
        require_share("floor", self.floor, upper_open=True)
        if not self.start <= self.stop or not self.stop:
            raise SlimError(
                f"`start` must not lie behind `stop`, and `stop` not at 0: got {self.start} and {self.stop}."
            )
        for name, value in {"every": self.every, **{f"round_to.{k}": v for k, v in self.round_to.items()}}.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SlimError(f"`{name}` must be a positive whole number, got {value!r}.")
        if not isinstance(self.rounds, int) or self.rounds < 2:
            raise SlimError(f"`rounds` must be a whole number from 2, got {self.rounds!r}; 1 is schedule one_shot.")
        if not isinstance(self.calibration_batches, int) or self.calibration_batches < 0:
            raise SlimError(f"`calibration_batches` must be a whole number from 0, got {self.calibration_batches!r}.")
        if self.repair and not self.calibration_batches:
            raise SlimError("`repair` looks at what flows through the model: set `calibration_batches`, such as 48.")
        for kind in self.round_to:
            _require_kind("round_to", kind)

    def _check_criterion(self) -> None:
        chosen = self.criterion_by_kind
        for name in chosen.values():
            CRITERIA[name]
        if self._shares_scores and len({chosen[kind] for kind in self.spend_on}) > 1:
            raise SlimError(
                f"A target that is spent on {', '.join(self.spend_on)} compares their scores, so it needs one "
                f"criterion for all of them, got {self.criterion}."
            )

    def _check_amounts(self) -> None:
        if self.target is not None:
            if self.sparsity is not None:
                raise SlimError("`sparsity` and `target` both say how much goes. Set one of them.")
            if len(self.target) != 1 or not set(self.target) <= set(MEASURES):
                raise SlimError(f"`target` must name one of {', '.join(MEASURES)}, got {self.target!r}.")
            share = next(iter(self.target.values()))
            require_share("target", share, upper_open=True)
            if not share:
                raise SlimError("`target` 0 would leave nothing. It is the share that stays, such as 0.6.")
            self._check_spend_on()
            return
        for kind, share in self.sparsity_by_kind.items():
            require_share(f"sparsity.{kind}", share, upper_open=True)
        if not any(self.sparsity_by_kind.values()):
            raise SlimError(
                f"`sparsity` is 0 for every kind: nothing would be removed. Set one of {', '.join(KINDS)}."
            )

    def _check_spend_on(self) -> None:
        for kind in self.spend_on:
            _require_kind("spend_on", kind)
        for kind, others in APART.items():
            clash = [other for other in self.spend_on if other in others]
            if kind in self.spend_on and clash:
                raise SlimError(
                    f"`spend_on` names {kind} and {', '.join(clash)}, which are parts of each other: what both save "
                    "cannot be told apart. Name one of them, and prune the other in a run of its own."
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
        """The kinds of structure that lose groups."""
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
        raise SlimError(f"`{name}` has no kind '{kind}'. {nearest(str(kind), KINDS)}")
