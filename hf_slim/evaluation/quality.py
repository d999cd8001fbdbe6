"""How good a model still is."""

import math

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def perplexity(model: nn.Module, blocks: Dataset, title: str = "perplexity") -> float:
    """Exponential of the mean loss per predicted token, in nats, over held-out blocks.

    Args:
        blocks: `input_ids` of one length each; every token but the first of a block is predicted.
    """
    model.eval()
    loss_sum, n_tokens = 0.0, 0
    for example in tqdm(blocks, desc=title, unit="block"):
        ids = torch.tensor([example["input_ids"]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss_sum += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        n_tokens += ids.shape[1] - 1
    return math.exp(loss_sum / n_tokens)


@torch.inference_mode()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int = 48) -> str:
    """The model's most likely continuation of `prompt`."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    output = model.generate(
        **inputs, max_new_tokens=n_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id, use_cache=True
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
