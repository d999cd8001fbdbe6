"""Measures how sensitive each layer is to low precision, and chooses a scheme for each layer within a budget."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_slim.core.errors import SlimConfigError
from hf_slim.core.report import write_atomically
from hf_slim.data import DataConfig, load_texts, text_blocks
from hf_slim.evaluation.picture import draw_sensitivity
from hf_slim.evaluation.sensitivity import LayerSensitivity, choose_schemes, measure_sensitivity
from hf_slim.integration.loading import load_model, load_tokenizer
from hf_slim.quantization.scheme import Scheme

logger = logging.getLogger(__name__)
SCHEMES = ("w2a16-g64", "w3a16-g64", "w4a16-g64", "w8a16")


def sensitivity(
    spec: str,
    data: DataConfig,
    budget_bits: float,
    output: str | Path,
    schemes: Sequence[str] = SCHEMES,
    n_blocks: int = 1,
) -> dict[str, Any]:
    """Measures every layer of a model with every scheme and writes the best mix in a budget: `hf-slim sensitivity`.

    Args:
        spec: A causal language model: a Hub id, a folder, or `package:<module>/<file>`.
        data: Source of the text, and length of its blocks.
        budget_bits: Bits per weight, scales included, on average over the layers that are quantized.
        output: Path without ending; `.yaml` (a `quantization` section for a recipe), `.json` and `.png` are written.
        schemes: Names of the schemes to choose from.
        n_blocks: Blocks of text to measure on.
    Returns: the content of the JSON file.
    Raises: SlimConfigError: for an unknown scheme, before anything is read, or a budget that no choice can meet.
    """
    for scheme in schemes:
        Scheme.parse(scheme)
    output = Path(output)
    logger.info("Loading the model '%s'.", spec)
    model, tokenizer = load_model(spec), load_tokenizer(spec)
    texts, _ = load_texts(data)
    blocks = text_blocks(texts, tokenizer, data, n_blocks, 0, "reading text")
    ids = [torch.tensor([example["input_ids"]]) for example in blocks]
    logger.info("Measuring every layer with %d schemes.", len(schemes))
    found = measure_sensitivity(model, ids, list(schemes))
    chosen = choose_schemes(found, budget_bits)
    result = summary(found, chosen, budget_bits)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output.with_suffix(".json"), lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    section = yaml.safe_dump(quantization_section(chosen), sort_keys=False, width=119)
    write_atomically(output.with_suffix(".yaml"), lambda path: path.write_text(section))
    draw_sensitivity(found, chosen, output.with_suffix(".png"))
    return result


def as_table(result: dict[str, Any]) -> str:
    """The result of `sensitivity` as a table: the chosen mix against every scheme used for all layers."""
    lines = [f"{'schemes':<12} {'bits per weight':>16} {'summed KL':>10} {'summed loss increase':>21}"]
    for name, mix in [("chosen", result["chosen"]), *result["uniform"].items()]:
        numbers = f"{mix['bits_per_weight']:>16.3f} {mix['divergence']:>10.4f} {mix['loss_increase']:>21.4f}"
        lines.append(f"{name:<12} {numbers}")
    return "\n".join(lines)


def quantization_section(chosen: dict[str, str]) -> dict[str, Any]:
    """The recipe section with every layer's scheme: the most frequent one for all, the others in `overrides`."""
    schemes = list(chosen.values())
    common = max(sorted(set(schemes)), key=schemes.count)
    overrides = {name: scheme for name, scheme in chosen.items() if scheme != common}
    return {"quantization": {"scheme": common, "overrides": overrides}}


def summary(found: list[LayerSensitivity], chosen: dict[str, str], budget_bits: float) -> dict[str, Any]:
    """Measures and choice as plain data, with bits per weight and expected loss, also for each uniform scheme."""
    total = sum(layer.weights for layer in found)

    def mix(pick: dict[str, str]) -> dict[str, float]:
        picked = [(layer, next(c for c in layer.choices if c.scheme == pick[layer.name])) for layer in found]
        return {
            "bits_per_weight": sum(layer.weights * choice.bits for layer, choice in picked) / total,
            "divergence": sum(choice.divergence for _, choice in picked),
            "loss_increase": sum(choice.loss_increase for _, choice in picked),
        }

    everywhere = set.intersection(*({c.scheme for c in layer.choices} for layer in found))
    return {
        "budget_bits": budget_bits,
        "chosen": mix(chosen),
        "uniform": {scheme: mix({layer.name: scheme for layer in found}) for scheme in sorted(everywhere)},
        "schemes": chosen,
        "layers": [asdict(layer) for layer in found],
    }


def parse_budget(text: str) -> float:
    """Bits per weight from "4.5bits" or "4.5". Raises SlimConfigError for any other text."""
    try:
        budget = float(text.removesuffix("bits").removesuffix("bit"))
    except ValueError:
        budget = 0.0
    if not 1 <= budget <= 16:
        raise SlimConfigError(f"`--budget` must be bits per weight between 1 and 16, such as '4.5bits', got '{text}'.")
    return budget
