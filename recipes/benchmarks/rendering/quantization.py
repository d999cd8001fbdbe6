"""Tables of the three benchmarks of quantization."""

from rendering.markdown import MISSING, Rows, change, measure, median, number, ratio, scaled, table

TEACHERS = {"none": "", "self": ", taught"}


def quality(rows: Rows) -> str:
    """Perplexity after training on a grid, and the share of the rounding gap that training saves."""
    floating = measure(rows, "float", "perplexity")
    grids = [name.split()[0] for name in rows if name.endswith("rounded to nearest")]
    found = []
    for grid in grids:
        rounded = measure(rows, f"{grid} rounded to nearest", "perplexity")
        for teacher, suffix in TEACHERS.items():
            sides = [measure(rows, f"{grid} {side}{suffix}", "perplexity") for side in ("torchao", "hf_slim")]
            if any(sides):
                shares = [
                    MISSING if side is None else f"{(rounded - side) / (rounded - floating):.1%}" for side in sides
                ]
                numbers = [number(value) for value in (floating, rounded)]
                found.append([f"{grid}-g64", teacher, *numbers, *map(number, sides), *shares])
    titles = ["grid", "teacher", "fine-tuned float", "rounded to nearest", "torchao QAT", "hf_slim",
              "recovered by torchao", "by hf_slim"]  # fmt: skip
    return table(titles, found, text_columns=2)


def training(rows: Rows) -> str:
    """A training step on every grid, against a plain one."""
    found = []
    for name in rows:
        if name.startswith("hf_slim "):
            scheme = name.removeprefix("hf_slim ")
            cells = [ratio(measure(rows, f"{side} {scheme}", key), measure(rows, "plain", key))
                     for key in ("fp32_ms", "bf16_ms") for side in ("hf_slim", "torchao")]  # fmt: skip
            memory = [change(measure(rows, f"{side} {scheme}", "peak_bytes"), measure(rows, "plain", "peak_bytes"))
                      for side in ("hf_slim", "torchao")]  # fmt: skip
            found.append([scheme, *cells, *memory])
    titles = ["scheme", "fp32", "torchao", "bf16", "torchao", "peak memory", "torchao"]
    return table(titles, found)


def plain_step(rows: Rows) -> str:
    """The step that `training` compares with."""
    found = [[key, number(measure(rows, "plain", f"{key}_ms"), "{:.0f} ms")] for key in ("fp32", "bf16")]
    return table(["plain training step", "time"], found) if "plain" in rows else ""


def inference(rows: Rows) -> str:
    """Prefill and decoding of packed models."""
    base = rows.get("fp32", {})
    found = []
    for name, values in rows.items():
        if "disk_bytes" in values:
            compiled = measure(rows, f"{name}, compiled", "decode_tokens_per_s")
            found.append([
                name, number(scaled(values["disk_bytes"], 1e-6), "{:.1f}"), number(values["prefill_ms"], "{:.0f} ms"),
                number(values["decode_tokens_per_s"], "{:.1f}"), ratio(base["prefill_ms"], values["prefill_ms"]),
                ratio(values["decode_tokens_per_s"], base["decode_tokens_per_s"]),
                ratio(compiled, measure(rows, "fp32, static cache", "decode_tokens_per_s")),
            ])  # fmt: skip
    titles = ["scheme", "MB on disk", "prefill, 256 tokens", "decode, tokens/s", "prefill", "decode",
              "decode, compiled"]  # fmt: skip
    return table(titles, found)


def peers_perplexity(rows: Rows) -> list[list[str]]:
    """The row of the table of peers: 3 bits, no teacher."""
    theirs, ours = (measure(rows, f"w3a16 {side}", "perplexity") for side in ("torchao", "hf_slim"))
    if theirs is None or ours is None:
        return []
    what = f"SmolLM2 trained at 3 bits: perplexity (float: {measure(rows, 'float', 'perplexity'):.3f})"
    return [[what, "torchao QAT", number(theirs), number(ours)]]


def peers_step(rows: Rows) -> list[list[str]]:
    """The row of the table of peers: a training step on int8 weights and activations."""
    plain, theirs, ours = (measure(rows, name, "fp32_ms") for name in ("plain", "torchao w8a8", "hf_slim w8a8"))
    if median(theirs) is None or median(ours) is None:
        return []
    what = "int8 training step, as a multiple of a plain fp32 one"
    return [[what, "torchao QAT", ratio(theirs, plain), ratio(ours, plain)]]
