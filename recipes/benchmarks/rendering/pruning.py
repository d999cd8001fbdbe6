"""Tables of the four benchmarks of pruning."""

from rendering.markdown import MISSING, Rows, change, measure, number, ratio, scaled, table

DENSE_ROWS = ("dense", "dense, trained on", "dense, taught on")
KINDS = {
    "SmolLM2 ffn": "25% of neurons", "SmolLM2 kv_heads": "12% of KV heads", "SmolLM2 layers": "12% of layers",
    "SmolLM2 attention_blocks": "of attention blocks", "SmolLM2 ffn_blocks": "of feed-forward blocks",
    "MiniLM ffn": "MiniLM, 25% of neurons", "MiniLM kv_heads": "of heads",
}  # fmt: skip


def quality(rows: Rows) -> str:
    """Perplexity after the same recovery, by share of the transformer that is removed."""
    shares = sorted({name.split()[-1] for name in rows if name.split()[0] in ("torch_pruning", "hf_slim")}, key=float)
    found = []
    for share in shares:
        cells = [("torch_pruning", "one_shot"), ("torch_pruning", "perplexity"), ("hf_slim uniform", "perplexity"),
                 ("hf_slim", "perplexity")]  # fmt: skip
        numbers = [number(measure(rows, f"{side} {share}", key)) for side, key in cells]
        found.append([f"{float(share):.0%}", *numbers])
    titles = ["transformer removed", "Torch-Pruning, one shot", "Torch-Pruning, recovered",
              "hf_slim, the same share of every layer", "hf_slim, across layers"]  # fmt: skip
    return table(titles, found)


def references(rows: Rows) -> str:
    """What the perplexities of `quality` are compared with."""
    untouched = measure(rows, "untouched", "perplexity")
    found = []
    for name, what in (("untouched", "untouched"), ("fine-tuned", "fine-tuned, not pruned"),
                       ("one shot", "25% of neurons removed by hf_slim, no training")):  # fmt: skip
        if value := measure(rows, name, "perplexity"):
            found.append([what, number(value), ratio(value, untouched)])
    return table(["model", "perplexity", "of untouched"], found)


def torch_pruning_criteria(rows: Rows) -> str:
    """One-shot perplexity of Torch-Pruning's criteria, best first."""
    found = sorted((values["one_shot"], name) for name, values in rows.items())
    return table(["criterion of Torch-Pruning", "perplexity"], [[name, f"{value:,.2f}"] for value, name in found])


def criteria(rows: Rows) -> str:
    """Every criterion on every kind: a multiple of the dense perplexity, or accuracy."""
    columns = [kind for kind in KINDS if f"{kind.split()[0]} dense" in rows]
    names = list(dict.fromkeys(name.split()[2] for name in rows if len(name.split()) == 3))
    found = [[name, *(_criterion_cell(rows, kind, name) for kind in columns)] for name in names]
    return table(["criterion", *(KINDS[kind] for kind in columns)], found)


def _criterion_cell(rows: Rows, kind: str, criterion: str) -> str:
    values = rows.get(f"{kind} {criterion}", {})
    if "accuracy" in values:
        return f"{values['accuracy']:.1%}"
    dense = measure(rows, f"{kind.split()[0]} dense", "perplexity")
    multiple = values["perplexity"] / dense if "perplexity" in values else None
    if multiple is None:
        return MISSING
    return ">1000x" if multiple > 1000 else f"{multiple:.3g}x"


def encoder(rows: Rows) -> str:
    """Accuracy of an encoder without heads and neurons, against the best dense one."""
    dense = max((rows[name]["accuracy"] for name in DENSE_ROWS if name in rows), default=0.0)
    found = [
        [name, f"{values['layer_parameters'] / 1e6:.2f} M", f"{values['accuracy']:.2%}",
         f"{100 * (values['accuracy'] - dense):+.2f}", f"{values['cpu_minutes']:.1f}"]
        for name, values in rows.items()
    ]  # fmt: skip
    return table(["heads and neurons", "parameters of the layers", "accuracy", "against the best dense",
                  "CPU minutes"], found)  # fmt: skip


def speed(rows: Rows) -> str:
    """Dense models against the same without half of their multiply-adds."""
    found = []
    for name, values in rows.items():
        model, _, part = name.partition(", ")
        if part == "inference":
            pairs = [(what.removesuffix(" ms") if what.endswith(" ms") else what, "ms" if what.endswith(" ms") else "",
                      pair) for what, pair in values.items()]  # fmt: skip
        else:
            pairs = [(part, "ms", values)] if part.startswith("training") else []
        for what, unit, pair in pairs:
            better = (pair["dense"], pair["half"]) if unit == "ms" else (pair["half"], pair["dense"])
            shown = [number(pair[side], f"{{:.1f}} {unit}".rstrip()) for side in ("dense", "half")]
            found.append([model, what, *shown, ratio(*better)])
    return table(["model", "measure", "dense", "half", "faster"], found, text_columns=2)


def callback(rows: Rows) -> str:
    """What the callback costs in a training step."""
    found = [
        [name.removeprefix("callback: "), number(values["plain_ms"], "{:.0f} ms"),
         number(values["callback_ms"], "{:.0f} ms"), ratio(values["callback_ms"], values["plain_ms"], "{:.3f}x"),
         number(values["scoring_ms"], "{:.1f} ms"), change(values["callback_peak_bytes"], values["plain_peak_bytes"])]
        for name, values in rows.items() if name.startswith("callback: ")
    ]  # fmt: skip
    return table(["pruned while training", "plain step", "with the callback", "ratio", "scoring once", "peak memory"],
                 found)  # fmt: skip


def removal(rows: Rows) -> str:
    """Finding the structure of SmolLM2 and removing 40% of it."""
    values = rows.get("removal of 40%")
    if not values:
        return ""
    cells = [number(values["seconds"], "{:.2f} s"), number(values["peak_of_model_bytes"], "{:.2f}x")]
    return table(["find the structure and remove 40% of SmolLM2", "result"],
                 zip(["time", "peak memory, of the model's bytes"], cells, strict=True))  # fmt: skip


def size(rows: Rows) -> str:
    """Parameters of the models that `speed` compares."""
    values = rows.get("SmolLM2, size")
    if not values:
        return ""
    cells = [number(scaled(values[f"{name}_parameters"], 1e-6), "{:.1f} M") for name in ("dense", "half")]
    return table(["SmolLM2", "dense", "half"], [["parameters", *cells]])


def peers_perplexity(rows: Rows) -> list[list[str]]:
    """The row of the table of peers: a fifth of the transformer removed, the same recovery."""
    theirs, ours = (measure(rows, f"{side} 0.2", "perplexity") for side in ("torch_pruning", "hf_slim"))
    if theirs is None or ours is None:
        return []
    dense = measure(rows, "fine-tuned", "perplexity")
    what = f"SmolLM2 without 20% of its transformer, after 100 steps: perplexity (unpruned: {number(dense)})"
    return [[what, "Torch-Pruning", number(theirs), number(ours)]]
