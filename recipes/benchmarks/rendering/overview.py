"""The tables of the README: the quickstart, and five results against peers."""

from hf_slim.core.report import table as report_table
from rendering import distillation, pruning, quantization
from rendering.markdown import Rows, table


def quickstart(rows: Rows) -> str:
    """Base and result of the quickstart, as its report shows them."""
    values = rows.get("compressed")
    if not values:
        return ""
    return table(["measure", "base", "result", "improvement"], report_table(values))


def uncompressed(rows: Rows) -> str:
    """Perplexity with and without compression after the same steps."""
    if not {"compressed", "uncompressed"} <= rows.keys():
        return ""
    found = [[what, f"{values['quality']['perplexity']:.2f}"] for what, values in (
        ("base", rows["compressed"]["base"]), ("fine-tuned, not compressed", rows["uncompressed"]["result"]),
        ("fine-tuned and compressed", rows["compressed"]["result"]))]  # fmt: skip
    return table(["SmolLM2", "held-out perplexity"], found)


def peers(results: dict[str, Rows]) -> str:
    """Five results against peers; a row that was not measured is left out."""
    found = [
        *quantization.peers_perplexity(results.get("quantization_quality", {})),
        *quantization.peers_step(results.get("quantization_training", {})),
        *distillation.peers_step(results.get("distillation_speed", {})),
        *distillation.peers_gradient(results.get("distillation_gradients", {})),
        *pruning.peers_perplexity(results.get("pruning_quality", {})),
    ]
    return table(["measure", "peer", "of the peer", "hf_slim"], found, text_columns=2)
