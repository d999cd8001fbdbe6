"""How much structure to remove, and when."""

from dataclasses import dataclass, field

from hf_slim.core.config import SlimConfig, require_share
from hf_slim.core.errors import SlimError, nearest
from hf_slim.core.schedule import SCHEDULES
from hf_slim.pruning.importance import CRITERIA

KINDS = ("ffn", "kv_heads")


@dataclass(frozen=True)
class PruningConfig(SlimConfig):
    """How much structure to remove, and when. Progress is the share of optimizer steps done, in [0, 1].

    Kinds of structure: `ffn` are the neurons of the feed-forward layers; `kv_heads` are key-value heads together with
    the query heads that read them (in multi-head attention: simply the heads).
    """

    sparsity: dict[str, float] | float = field(
        default_factory=lambda: {"ffn": 0.5},
        metadata={"help": "Share of groups removed at the end, in [0, 1), per kind; one number means every kind."},
    )
    uniform: dict[str, bool] | bool = field(
        default=True,
        metadata={
            "help": "Whether every layer loses the same number (a plain config), or the least important lose most."
        },
    )
    criterion: str = field(default="taylor", metadata={"help": f"Importance of a group: {', '.join(CRITERIA)}."})
    schedule: str = field(default="cubic", metadata={"help": f"How removal advances: {', '.join(SCHEDULES)}."})
    start: float = field(default=0.05, metadata={"help": "Progress before which nothing is removed, in [0, 1]."})
    stop: float = field(default=0.5, metadata={"help": "Progress after which nothing is removed, in (0, 1]."})

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", _per_kind("sparsity", self.sparsity, default=0.0))
        object.__setattr__(self, "uniform", _per_kind("uniform", self.uniform, default=True))
        for kind, share in self.sparsity.items():
            require_share(f"sparsity.{kind}", share, upper_open=True)
        for kind, value in self.uniform.items():
            if not isinstance(value, bool):
                raise SlimError(f"`uniform.{kind}` must be true or false, got {value!r}.")
        if not any(self.sparsity.values()):
            raise SlimError(
                f"`sparsity` is 0 for every kind: nothing would be removed. Set one of {', '.join(KINDS)}."
            )
        CRITERIA[self.criterion]
        SCHEDULES[self.schedule]
        require_share("start", self.start)
        require_share("stop", self.stop)
        if not self.start <= self.stop or not self.stop:
            raise SlimError(
                f"`start` must not lie behind `stop`, and `stop` not at 0: got {self.start} and {self.stop}."
            )


def _per_kind(name: str, value: object, default: object) -> dict:
    if not isinstance(value, dict):
        return dict.fromkeys(KINDS, value)
    for kind in value:
        if kind not in KINDS:
            raise SlimError(f"`{name}` has no kind '{kind}'. {nearest(str(kind), KINDS)}")
    return {kind: value.get(kind, default) for kind in KINDS}
