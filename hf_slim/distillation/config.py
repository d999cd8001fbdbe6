"""Settings of distillation: teachers, losses and their weights."""

import math
from dataclasses import dataclass, field
from typing import Any

from hf_slim.core.config import SlimConfig, require_share, require_whole
from hf_slim.core.errors import SlimConfigError
from hf_slim.core.schedule import SCHEDULES, scheduled
from hf_slim.distillation.losses.attention import AttentionConfig
from hf_slim.distillation.losses.divergences import DIVERGENCES
from hf_slim.distillation.losses.hidden_states import HiddenConfig
from hf_slim.distillation.on_policy import OnPolicyConfig

PARTS = {"hidden": HiddenConfig, "attention": AttentionConfig, "on_policy": OnPolicyConfig}
LOAD_OPTIONS = ("dtype", "quantization", "device_map")
QUANTIZATIONS = ("nf4", "fp4", "int8")


@dataclass(frozen=True)
class DistillationConfig(SlimConfig):
    """The teacher, the losses that compare it with the student, and their weights.

    The loss is `(1 - alpha) * task + alpha * terms`, each term a weighted mean over predicted tokens. Divergences of
    the outputs are multiplied by the square of the temperature, so that gradients keep their size (Hinton et al. 2015,
    arXiv:1503.02531, sec. 2).
    """

    teacher: str | list[str] = "self"
    """The teacher: `self` (the model before training; for a model with adapters, the model without them), a Hub id, a
    folder with a saved model, or a folder that `hf-slim cache-teacher` wrote. A list names several teachers, of which
    the student learns the mean probabilities."""

    teacher_weights: list[float] | None = None
    """Weight of each of several teachers in the mean of their probabilities, positive, one number for each. `null`:
    all count the same."""

    teacher_load: dict[str, str] = field(default_factory=dict, metadata={"keys": LOAD_OPTIONS})
    """How a named teacher is loaded: `dtype` (such as `bfloat16`), `quantization` (`nf4`, `fp4` or `int8`, by
    bitsandbytes) and `device_map` (`auto` offloads what does not fit on the device). Empty: as `from_pretrained` loads
    it."""

    alpha: float = 0.5
    """Weight of the teacher's terms against the labels, in [0, 1]: the loss is `(1 - alpha) * task + alpha * terms`. 1
    needs no labels; 0 is an error unless `alpha_end` is set."""

    alpha_end: float | None = None
    """The same weight at the end of training, in [0, 1], reached along `alpha_schedule`. `null`: `alpha` stays
    constant."""

    alpha_schedule: str = field(default="linear", metadata={"choices": SCHEDULES})
    """How the weight moves from `alpha` to `alpha_end`: a registered schedule; unused without `alpha_end`."""

    temperature: float = 1.0
    """Both distributions are computed from logits divided by this number, which is positive. Above 1 the teacher's
    small probabilities count more; 1 leaves the distributions as they are."""

    losses: str | dict[str, float] = field(default="forward_kl", metadata={"choices": DIVERGENCES})
    """Divergence between the output distributions of teacher and student: a registered loss, or a mapping from losses
    to positive weights. An empty mapping compares only `hidden` or `attention`."""

    beta: float = 0.5
    """Parameter of `jensen_shannon`, in (0, 1): the weight of the teacher in the mixture. Near 0 the loss behaves like
    `forward_kl`, near 1 like `reverse_kl`."""

    skew: float = 0.1
    """Parameter of `skewed_kl` and `skewed_reverse_kl`, in (0, 1): how much of the first distribution is mixed into
    the second."""

    top_k: int | None = None
    """Compare only this many most probable classes of the teacher, a whole number of at least 1, and the sum of all
    others as one more class. `null`: all classes are compared."""

    hidden: HiddenConfig | None = None
    """Settings of the loss on hidden states. `null`: hidden states are not compared."""

    attention: AttentionConfig | None = None
    """Settings of the loss on attention. `null`: attention is not compared."""

    on_policy: OnPolicyConfig | None = None
    """Settings of on-policy batches, in which the student generates the text on which the teacher is compared. `null`:
    only the texts of the data are used."""

    def __post_init__(self) -> None:
        for name, part in PARTS.items():
            value = vars(self)[name]
            if isinstance(value, dict):
                object.__setattr__(self, name, part.from_dict(value))
        self._check_teachers()
        self._check_alpha()
        if not isinstance(self.temperature, (int, float)) or not 0 < self.temperature < math.inf:
            raise SlimConfigError(
                f"`temperature` must be a positive number, got {self.temperature!r}. Use 1 for none."
            )
        self._check_losses()

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of all teachers."""
        return (self.teacher,) if isinstance(self.teacher, str) else tuple(self.teacher)

    @property
    def divergences(self) -> dict[str, float]:
        """Name of each divergence -> its weight."""
        return {self.losses: 1.0} if isinstance(self.losses, str) else dict(self.losses)

    def parameter_of(self, divergence: str) -> float:
        """Third argument of a divergence: `beta` for jensen_shannon, `skew` for all others.

        Args:
            divergence: An entry of `DIVERGENCES`.
        """
        return self.beta if divergence == "jensen_shannon" else self.skew

    def alpha_at(self, progress: float) -> float:
        """Weight of the teacher's terms, in [0, 1].

        Args:
            progress: Share of the optimizer steps that are done, in [0, 1].
        """
        if self.alpha_end is None:
            return self.alpha
        return self.alpha + (self.alpha_end - self.alpha) * scheduled(self.alpha_schedule, progress, 0.0, 1.0, 2)

    def _check_teachers(self) -> None:
        names = self.teachers
        if not names or not all(isinstance(name, str) and name for name in names):
            raise SlimConfigError(
                f"`teacher` must be 'self', a Hub id or a path, or a list of them, got {self.teacher!r}."
            )
        weights = self.teacher_weights
        if weights is not None and (len(weights) != len(names) or not all(_positive(weight) for weight in weights)):
            raise SlimConfigError(
                f"`teacher_weights` must be {len(names)} positive numbers, one per teacher, got {weights}."
            )
        for key, value in self.teacher_load.items():
            if key not in LOAD_OPTIONS:
                raise SlimConfigError(f"`teacher_load` has no '{key}'. Allowed: {', '.join(LOAD_OPTIONS)}.")
            if key == "quantization" and value not in QUANTIZATIONS:
                raise SlimConfigError(
                    f"`teacher_load.quantization` must be one of {', '.join(QUANTIZATIONS)}, got {value!r}."
                )

    def _check_alpha(self) -> None:
        for name, value in (("alpha", self.alpha), ("alpha_end", self.alpha_end)):
            if value is not None:
                require_share(name, value)
        if self.alpha == 0 and not self.alpha_end:
            raise SlimConfigError(
                "`alpha` is 0: the teacher would have no effect. Raise it, or remove `distillation`."
            )
        SCHEDULES[self.alpha_schedule]

    def _check_losses(self) -> None:
        for name, weight in self.divergences.items():
            DIVERGENCES[name]
            if not _positive(weight):
                raise SlimConfigError(f"The weight of the loss '{name}' must be a positive number, got {weight!r}.")
        if not self.divergences and self.hidden is None and self.attention is None:
            raise SlimConfigError("`losses` is empty, and neither `hidden` nor `attention` is set. Name a loss.")
        for name, value in (("beta", self.beta), ("skew", self.skew)):
            if not isinstance(value, (int, float)) or not 0 < value < 1:
                raise SlimConfigError(
                    f"`{name}` must be between 0 and 1, got {value!r}. For 0 or 1, use forward_kl or reverse_kl."
                )
        if self.top_k is not None:
            require_whole("top_k", self.top_k, hint="None compares all classes.")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
