"""On-policy distillation: the student writes the answers on which the teacher judges it."""

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
from hf_slim.core.modules import evaluating
from hf_slim.core.record import unwrapped
from hf_slim.distillation.targets import IGNORED

USED = ("input_ids", "attention_mask", "labels")
DROPPED = ("num_items_in_batch", "return_dict", "use_cache")  # say nothing about the text


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
                "`prompt_share` is 0: the student would have nothing to go on from. Use for instance 0.5."
            )
        require_whole("max_new_tokens", self.max_new_tokens)
        is_number = isinstance(self.temperature, (int, float)) and not isinstance(self.temperature, bool)
        if not is_number or not 0 <= self.temperature < math.inf:
            raise SlimConfigError(f"`temperature` must be a number from 0, got {self.temperature!r}. Use 1 for none.")


def is_on_policy(share: float, seed: int, step: int, micro_step: int) -> bool:
    """Whether this micro-batch takes the student's own answers: a coin that falls alike on every rank and on resuming.

    Args:
        share: Probability of True, in [0, 1].
        seed: Of the run.
        step: Optimizer steps done.
        micro_step: Micro-batches done within the step.
    """
    return random.Random(f"on-policy {seed} {step} {micro_step}").random() < share


def answer_seed(seed: int, step: int, micro_step: int, rank: int) -> int:
    """A seed for `own_answers` that no other micro-batch and no other rank of a run shares, in [0, 2**63)."""
    return random.Random(f"answers {seed} {step} {micro_step} {rank}").getrandbits(63)


def own_answers(model: nn.Module, inputs: dict[str, Any], settings: OnPolicyConfig, seed: int) -> dict[str, Tensor]:
    """The batch's prompts with answers that the model writes now, in place of those that the data has.

    A prompt is what lies before the first label that counts; where that is nothing, the first `prompt_share` of the
    text; where no label counts, all of it. Answers end with the end-of-text token, which counts, or at
    `max_new_tokens`, earlier if the model's positions run out; a prompt that leaves it none is left out. Sampling is
    from the model's own distribution at a temperature: its generation config (top-p, penalties) has no say.

    The model writes in evaluation mode, without gradients, with a cache. Its modes and generation config and the
    global random state are as before afterwards, also after an exception.

    Args:
        model: A causal language model, wrapped by adapters or not.
        inputs: `input_ids` `(batch, length)`, `labels` alike with -100 where nothing is predicted, and maybe
            `attention_mask`; padded on either side.
        settings: Gives `max_new_tokens`, `temperature` and `prompt_share`.
        seed: Fixes the answers to a batch; see `answer_seed`.
    Returns: `input_ids`, `attention_mask` and `labels`, `(at most batch, new_length)`, padded on the right; at least
        one label counts in every row. How many count differs from what the Trainer counted in the data.
    Raises: SlimError: for inputs that cannot be carried over (packed sequences, images), a model that cannot generate,
        or no prompt that leaves room for an answer.
    """
    _check(model, inputs)
    prompts = _prompts(inputs, settings.prompt_share)
    prompts, new_tokens = _with_room(prompts, _positions(model), settings.max_new_tokens)
    ends, padding = _special_tokens(model)
    generation = {"max_new_tokens": new_tokens, "eos_token_id": ends or None, "pad_token_id": padding}
    if settings.temperature:
        generation |= {"do_sample": True, "temperature": float(settings.temperature), "top_k": 0}
    ids = pad_sequence(prompts, batch_first=True, padding_value=padding, padding_side="left")
    kept = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
    with evaluating(model), _generating(model, generation), _seeded(model, seed), torch.no_grad():
        written = model.generate(input_ids=ids, attention_mask=kept)[:, ids.shape[1] :]
    return _packed(prompts, [_until_end(answer, ends) for answer in written], padding)


def _check(model: nn.Module, inputs: dict[str, Any]) -> None:
    given = {name for name, value in inputs.items() if value is not None}
    if missing := {"input_ids", "labels"} - given:
        raise SlimDataError(
            f"On-policy distillation needs `input_ids` and `labels`; {', '.join(sorted(missing))} is missing."
        )
    if other := given - {*USED, *DROPPED}:
        raise SlimDataError(
            f"On-policy distillation cannot carry {', '.join(sorted(other))} over to another text. It takes plain, "
            "unpacked text: use a collator that pads, and drop other columns, or set its `share` to 0."
        )
    if not hasattr(model, "generate"):
        raise SlimError(
            f"{type(model).__name__} cannot generate, so it has no answers of its own. Use a causal language model."
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
    """Those prompts that leave at least one position, and how long an answer to all of them can be."""
    roomy = [prompt for prompt in prompts if len(prompt) and (positions is None or len(prompt) < positions)]
    if not roomy:
        raise SlimDataError(
            f"No prompt in this batch leaves room for an answer: they have {[len(p) for p in prompts]} tokens, and "
            f"the model has {positions} positions. Shorten the prompts, or mark them with labels of -100."
        )
    if positions is not None:
        new_tokens = min(new_tokens, positions - max(len(prompt) for prompt in roomy))
    return roomy, new_tokens


def _packed(prompts: list[Tensor], answers: list[Tensor], padding: int) -> dict[str, Tensor]:
    texts = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
    labels = [
        torch.cat([torch.full_like(prompt, IGNORED), answer])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]  # fmt: skip
    return {
        "input_ids": pad_sequence(texts, batch_first=True, padding_value=padding),
        "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def _until_end(answer: Tensor, ends: list[int]) -> Tensor:
    """The answer up to its first end-of-text token, which belongs to it: what follows is padding."""
    found = torch.isin(answer, torch.tensor(ends, dtype=answer.dtype, device=answer.device)).nonzero().flatten()
    return answer[: found[0] + 1] if len(found) else answer


def _positions(model: nn.Module) -> int | None:
    return getattr(_text_config(model), "max_position_embeddings", None)


def _special_tokens(model: nn.Module) -> tuple[list[int], int]:
    """End-of-text tokens, and one that may fill a masked position."""
    configs = (getattr(unwrapped(model), "generation_config", None), _text_config(model))

    def ids(name: str) -> list[int]:
        found = next((value for config in configs if (value := getattr(config, name, None)) is not None), [])
        return list(found) if isinstance(found, (list, tuple)) else [found]

    ends, vocabulary = ids("eos_token_id"), unwrapped(model).get_input_embeddings().weight.shape[0]
    return ends, next((token for token in (*ids("pad_token_id"), *ends) if 0 <= token < vocabulary), 0)


def _text_config(model: nn.Module) -> Any:
    config = getattr(unwrapped(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextlib.contextmanager
def _generating(model: nn.Module, settings: dict[str, Any]) -> Iterator[None]:
    """The model with a generation config of nothing but `settings`: `generate` fills gaps from the model's own."""
    # an adapter wrapper has one of its own, and hands it to the model inside
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
    """The random state of the model's devices fixed by `seed`, and put back afterwards."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(sorted(device.index or 0 for device in devices), device_type=kind):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed devices that are not put back
        for device in devices:
            with torch.get_device_module(device).device(device):
                torch.get_device_module(device).manual_seed(seed)
        yield
