"""The techniques of a recipe in sentences, from the settings that the report holds."""

from collections.abc import Callable
from typing import Any

Settings = dict[str, Any]
KINDS = {  # of structure that pruning removes, for people; others are called as in recipes
    "ffn": "feed-forward neurons", "kv_heads": "key-value heads", "attention_blocks": "attention blocks",
    "ffn_blocks": "feed-forward blocks", "hidden": "hidden channels", "macs": "multiply-adds",
}  # fmt: skip


def steps_of(stage: Settings) -> list[str]:
    """What one stage did, a sentence for each technique and one for the training.

    Args:
        stage: Section -> settings, as in a recipe.
    """
    steps = [say(stage[name]) for name, say in SENTENCES.items() if stage.get(name) is not None]
    training = stage.get("training")
    return steps if training is None else [*steps, _training(training, stage.get("data", {}).get("block_size"))]


def _vocabulary(settings: Settings) -> str:
    return "The tokens that the data never uses were removed from the vocabulary."


def _student(settings: Settings) -> str:
    kept = {name: value for name, value in settings.items() if value not in (None, False)}
    return f"A smaller model was cut out of the base: {_pairs(kept)}."


def _distillation(settings: Settings) -> str:
    teachers = settings.get("teacher", "self")
    names = [teachers] if isinstance(teachers, str) else teachers
    said = " and ".join("its own state before training" if name == "self" else f"`{name}`" for name in names)
    losses = settings.get("losses", "forward_kl")
    compared = losses if isinstance(losses, str) else _pairs(losses)
    more = [name for name in ("hidden", "attention", "on_policy") if settings.get(name)]
    return f"Distillation from {said}: {', '.join([compared, *more]) or 'no divergence'}, weight {_alpha(settings)}."


def _alpha(settings: Settings) -> str:
    start, end = settings.get("alpha", 0.5), settings.get("alpha_end")
    return f"{start:g}" if end is None else f"{start:g} to {end:g}"


def _pruning(settings: Settings) -> str:
    criterion = settings.get("criterion")
    by = f", by {criterion if isinstance(criterion, str) else _pairs(criterion)}" if criterion else ""
    if settings.get("target"):
        ((measure, share),) = settings["target"].items()
        return f"Pruning to {share:.0%} of the {KINDS.get(measure, measure)}{by}."
    sparsity = settings.get("sparsity") or {"ffn": 0.5}
    shares = sparsity if isinstance(sparsity, dict) else {"ffn": sparsity, "kv_heads": sparsity}
    removed = " and ".join(f"{share:.0%} of the {KINDS.get(kind, kind)}" for kind, share in shares.items() if share)
    uniform = settings.get("uniform", True)
    where = "the same number in every layer" if uniform is True else "the least important of the whole model"
    return f"Pruning of {removed} ({where}){by}." if isinstance(uniform, bool) else f"Pruning of {removed}{by}."


def _quantization(settings: Settings) -> str:
    embeddings = settings.get("embeddings")
    table = f"embeddings to {_name(embeddings)}" if embeddings else "embeddings stay in floating point"
    cache = f"; the KV cache to {settings['kv_cache']}" if settings.get("kv_cache") else ""
    return f"Quantization-aware training to {_name(settings.get('scheme', 'w8a8'))}; {table}{cache}."


def _training(settings: Settings, block_size: int | None) -> str:
    length = (
        f"{settings['max_steps']} steps" if settings.get("max_steps", -1) > 0
        else f"{settings.get('num_train_epochs', 3):g} epochs"
    )  # fmt: skip
    size = settings.get("per_device_train_batch_size", 8)
    micro = settings.get("gradient_accumulation_steps", 1)
    batch = f"batches of {size}" + (f" x {micro}" if micro > 1 else "")
    texts = f", texts of up to {block_size} tokens" if block_size else ""
    rate = f", learning rate {settings['learning_rate']:g}" if "learning_rate" in settings else ""
    return f"Training: {length}, {batch} on each device{texts}{rate}."


def _name(scheme: Any) -> str:
    return scheme if isinstance(scheme, str) else "a grid of its own (see report.json)"


def _pairs(values: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


SENTENCES: dict[str, Callable[[Settings], str]] = {
    "vocabulary": _vocabulary, "student": _student, "distillation": _distillation, "pruning": _pruning,
    "quantization": _quantization,
}  # fmt: skip
