"""Which teacher, and how much it counts."""

from dataclasses import dataclass, field

from hf_slim.core.config import SlimConfig, require_share
from hf_slim.core.errors import SlimError


@dataclass(frozen=True)
class DistillationConfig(SlimConfig):
    """The loss becomes `(1 - alpha) * task + alpha * temperature**2 * KL(teacher || student)` per predicted token."""

    teacher: str = field(
        default="self",
        metadata={"help": "'self' (the model as it was before training), a Hub id, or a path of a saved model."},
    )
    alpha: float = field(
        default=0.5, metadata={"help": "Weight of the teacher's answers against the labels, in (0, 1]."}
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Softens both distributions; above 1 the teacher's small probabilities count more."},
    )

    def __post_init__(self) -> None:
        require_share("alpha", self.alpha)
        if self.alpha == 0:
            raise SlimError("`alpha` is 0: the teacher would run and not count. Raise it, or drop the distillation.")
        if not isinstance(self.temperature, (int, float)) or not 0 < self.temperature < float("inf"):
            raise SlimError(f"`temperature` must be a positive number, got {self.temperature!r}. Use 1 for none.")
        if not isinstance(self.teacher, str) or not self.teacher:
            raise SlimError(f"`teacher` must be 'self', a Hub id or a path, got {self.teacher!r}.")
