"""On-policy distillation: the student generates the text on which it is compared with the teacher."""

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hf_slim.core.config import SlimConfig, require_share, require_whole
from hf_slim.core.errors import SlimConfigError, SlimDataError, SlimError
from hf_slim.core.host import field_of, method_or_none, text_config_of
from hf_slim.core.modules import evaluating
from hf_slim.core.record import unwrapped
from hf_slim.distillation.targets import IGNORED

USED = ("input_ids", "attention_mask", "labels")
DROPPED = ("num_items_in_batch", "return_dict", "use_cache")  # not about the text


@dataclass(frozen=True)
class OnPolicyConfig(SlimConfig):
    """How often the student generates the text that it is trained on, and how.

    Source: Agarwal et al. 2024, GKD, arXiv:2306.13649, algorithm 1.
    """

    share: float = 0.5
    """Share of the micro-batches in which the student generates the answers, in [0, 1]; the others use the data."""

    max_new_tokens: int = 128
    """Longest generated answer in tokens, a whole number of at least 1."""

    temperature: float = 1.0
    """Temperature at which the student samples, a number of at least 0. 0 takes the most probable token each time; 1
    samples from the student's own distribution."""

    prompt_share: float = 0.5
    """Share of a text that serves as the prompt when its labels do not mark one, in (0, 1]."""

    def __post_init__(self) -> None:
        require_share("share", self.share)
        require_share("prompt_share", self.prompt_share)
        if self.prompt_share == 0:
            raise SlimConfigError(
                "`prompt_share` is 0: the student would have no prompt to continue. Use for instance 0.5."
            )
        require_whole("max_new_tokens", self.max_new_tokens)
        is_number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        if not is_number or not 0 <= self.temperature < math.inf:
            raise SlimConfigError(
                f"`temperature` must be a number of at least 0, got {self.temperature!r}. Use 1 for the student's own "
                "distribution."
            )


def is_on_policy(share: float, seed: int, step: int, micro_step: int) -> bool:
    """Whether the student generates this micro-batch: random, and the same on every rank and in a resumed run.

    Args:
        share: Probability of True, in [0, 1].
        seed: Seed of the run.
        step: Optimizer steps done.
        micro_step: Micro-batches done within the step.
    """
    return random.Random(f"on-policy {seed} {step} {micro_step}").random() < share


def generation_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Seed for `generated_completions`, in [0, 2**63), different for every micro-batch and rank of a run.

    Args:
        seed: Seed of the run.
        step: Optimizer steps done.
        micro_step: Micro-batches done within the step.
        rank: Index of the process.
    """
    return random.Random(f"answers {seed} {step} {micro_step} {rank}").getrandbits(63)


def generated_completions(
    model: nn.Module, inputs: dict[str, Any], settings: OnPolicyConfig, seed: int
) -> dict[str, Tensor]:
    """Prompts of the batch with completions that the model generates, instead of the completions in the data.

    The prompt is the text before the first label that is not -100. If that is empty, it is the first `prompt_share` of
    the text; if all labels are -100, it is the whole text. A completion ends with the end-of-text token, which has a
    label, or after `max_new_tokens`, or at the model's last position. Prompts that leave no position are dropped.
    Tokens are sampled from the model's own distribution; its generation config (top-p, penalties) is not used.

    The model generates in evaluation mode, without gradients, with a cache. Its modes, its generation config and the
    global random state are as before afterwards, also after an exception.

    Args:
        model: A causal language model, with or without adapters.
        inputs: `input_ids` `(batch, length)`, `labels` of the same shape with -100 where nothing is predicted, and
            optionally `attention_mask`; padded on either side.
        settings: Gives `max_new_tokens`, `temperature` and `prompt_share`.
        seed: Seed of the sampling; see `generation_seed`.
    Returns: `input_ids`, `attention_mask` and `labels`, `(at most batch, new_length)`, padded on the right. Every row
        has at least one label that is not -100. Their number differs from the Trainer's count of the data.
    Raises: SlimError: for inputs that belong to the original text only (packed sequences, images), a model that cannot
        generate, or a batch in which no prompt leaves a position for a completion.
    """
    _check(model, inputs)
    inner = unwrapped(model)
    positions = field_of(text_config_of(inner), "max_position_embeddings")
    prompts, new_tokens = _with_room(_prompts(inputs, settings.prompt_share), positions, settings.max_new_tokens)
    ends, padding = _special_tokens(inner)
    generation = {"max_new_tokens": new_tokens, "eos_token_id": ends or None, "pad_token_id": padding}
    if settings.temperature:
        generation |= {"do_sample": True, "temperature": float(settings.temperature), "top_k": 0}
    ids = pad_sequence(prompts, batch_first=True, padding_value=padding, padding_side="left")
    kept = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    with evaluating(model), _generating(model, generation), _seeded(model, seed), torch.no_grad():
        completions = model.generate(input_ids=ids, attention_mask=kept)[:, ids.shape[1] :]
    return _batch_of(prompts, [_until_end(completion, ends) for completion in completions], padding)


def _check(model: nn.Module, inputs: dict[str, Any]) -> None:
    given = {name for name, value in inputs.items() if value is not None}
    if missing := {"input_ids", "labels"} - given:
        raise SlimDataError(
            f"On-policy distillation needs `input_ids` and `labels`; {', '.join(sorted(missing))} is missing. Add it "
            "to the dataset, or remove `on_policy`."
        )
    if other := given - {*USED, *DROPPED}:
        raise SlimDataError(
            f"On-policy distillation cannot use {', '.join(sorted(other))} for a generated text. It takes plain, "
            "unpacked text: use a collator that pads, and remove other columns, or set `on_policy.share` to 0."
        )
    if method_or_none(model, "generate") is None:
        raise SlimError(
            f"{type(model).__name__} cannot generate text. Use a causal language model, or remove `on_policy`."
        )


def _prompts(inputs: dict[str, Tensor], share: float) -> list[Tensor]:
    ids, labels, mask = (inputs.get(name) for name in ("input_ids", "labels", "attention_mask"))
    mask = torch.ones_like(ids) if mask is None else mask
    prompts = []
    for row_ids, row_labels, row_mask in zip(ids, labels, mask.bool(), strict=True):
        row_ids, counted = row_ids[row_mask], (row_labels[row_mask] != IGNORED).nonzero().flatten().tolist()
        length = len(row_ids) if not counted else counted[0] or max(1, int(share * (counted[-1] + 1)))
        prompts.append(row_ids[:length])
    return prompts


def _with_room(prompts: list[Tensor], positions: int | None, new_tokens: int) -> tuple[list[Tensor], int]:
    """Prompts that leave at least one position, and the largest number of new tokens that fits after all of them."""
    roomy = [prompt for prompt in prompts if len(prompt) and (positions is None or len(prompt) < positions)]
    if not roomy:
        raise SlimDataError(
            f"No prompt in this batch leaves a position for a completion: they have {[len(p) for p in prompts]} "
            f"tokens, and the model has {positions} positions. Shorten the prompts, or mark them with labels of -100."
        )
    if positions is not None:
        new_tokens = min(new_tokens, positions - max(len(prompt) for prompt in roomy))
    return roomy, new_tokens


def _batch_of(prompts: list[Tensor], completions: list[Tensor], padding: int) -> dict[str, Tensor]:
    pairs = list(zip(prompts, completions, strict=True))
    texts = [torch.cat(pair) for pair in pairs]
    labels = [torch.cat([torch.full_like(prompt, IGNORED), completion]) for prompt, completion in pairs]
    return {
        "input_ids": pad_sequence(texts, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def _until_end(completion: Tensor, ends: list[int]) -> Tensor:
    """Cut the completion after its first end-of-text token; the rest is padding."""
    end_ids = torch.tensor(ends, dtype=completion.dtype, device=completion.device)
    found = torch.isin(completion, end_ids).nonzero().flatten()
    return completion[: found[0] + 1] if len(found) else completion


def _special_tokens(model: nn.Module) -> tuple[list[int], int]:
    """End-of-text tokens, and a token for padding."""
    configs = (vars(model).get("generation_config"), text_config_of(model))

    def ids(name: str) -> list[int]:
        found = next((value for config in configs if (value := field_of(config, name)) is not None), [])
        return list(found) if isinstance(found, (list, tuple)) else [found]

    ends, vocabulary = ids("eos_token_id"), model.get_input_embeddings().weight.shape[0]
    return ends, next((token for token in (*ids("pad_token_id"), *ends) if 0 <= token < vocabulary), 0)


@contextlib.contextmanager
def _generating(model: nn.Module, settings: dict[str, Any]) -> Iterator[None]:
    """Replace the model's generation config by `settings` alone, because `generate` takes missing values from it."""
    # an adapter wrapper has its own generation config, which it copies to the model inside
    owners = {id(owner): owner for owner in (model, unwrapped(model))}.values()
    before = [(owner, vars(owner).get("generation_config")) for owner in owners]
    config_class = type(model.generation_config)
    try:
        for owner in owners:
            owner.generation_config = config_class(use_cache=True, **settings)
        yield
    finally:
        for owner, config in before:
            if config is None:
                vars(owner).pop("generation_config", None)
            else:
                owner.generation_config = config


@contextlib.contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed the random generators of the model's devices, and restore their states afterwards."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(sorted(device.index or 0 for device in devices), device_type=kind):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would also seed devices that are not restored
        for device in devices:
            with torch.get_device_module(device).device(device):
                torch.get_device_module(device).manual_seed(seed)
        yield
