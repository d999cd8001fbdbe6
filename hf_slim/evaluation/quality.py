"""Quality of a model: perplexity, accuracy and loss, and a sample of its text."""

import math
import statistics
from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_slim.core.modules import evaluating
from hf_slim.progress import progress

CERTAIN = 1.96  # standard errors on each side of a mean: 95% of a normal distribution


def perplexity(model: nn.Module, blocks: Dataset, title: str = "perplexity") -> float:
    """Exponential of the mean loss per predicted token, in nats, over held-out blocks.

    Args:
        blocks: Rows with `input_ids`; every token of a block except the first is predicted.
    """
    return perplexity_with_interval(model, blocks, title)[0]


@torch.inference_mode()
def perplexity_with_interval(
    model: nn.Module, blocks: Dataset, title: str = "perplexity"
) -> tuple[float, list[float] | None]:
    """`perplexity`, and its 95% interval over blocks: the block is what was drawn, so its mean loss is one sample.

    Returns: the interval as `[low, high]`; None with fewer than two blocks.
    """
    loss_sum, n_tokens, means = 0.0, 0, []
    with evaluating(model):
        for example in progress(blocks, title, "block"):
            ids = torch.tensor([example["input_ids"]], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            block_sum = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            loss_sum += block_sum
            n_tokens += ids.shape[1] - 1
            means.append(block_sum / (ids.shape[1] - 1))
    loss = loss_sum / n_tokens
    if len(means) < 2:
        return math.exp(loss), None
    margin = CERTAIN * statistics.stdev(means) / math.sqrt(len(means))
    return math.exp(loss), [math.exp(loss - margin), math.exp(loss + margin)]


@torch.inference_mode()
def accuracy_and_loss(
    model: PreTrainedModel,
    examples: Dataset,
    collate: Callable[[list[dict]], dict[str, Tensor]],
    batch_size: int,
    name: str,
) -> tuple[float, float]:
    """Share of examples whose most likely class is the right one, in [0, 1], and the mean cross-entropy, in nats."""
    right, loss_sum = 0, 0.0
    with evaluating(model):
        for start in progress(range(0, len(examples), batch_size), f"accuracy of {name}", "batch"):
            batch = collate([examples[i] for i in range(start, min(start + batch_size, len(examples)))])
            batch = {key: value.to(model.device) for key, value in batch.items()}
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            right += (logits.argmax(-1) == labels).sum().item()
            loss_sum += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    return right / len(examples), loss_sum / len(examples)


@torch.inference_mode()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int = 48) -> str:
    """The model's most likely continuation of `prompt`."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(
        **inputs, max_new_tokens=n_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id, use_cache=True
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
