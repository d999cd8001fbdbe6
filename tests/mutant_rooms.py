"""Which tests must notice faults in which files, faults that went unnoticed, and changes that nobody can notice."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Room:
    """Files, and the tests that must notice faults in them.

    Attributes:
        files: Path from the folder of the package -> functions that get faults; none: all of the file.
        tests: Paths from the root of the repository, the fastest first.
    """

    files: dict[str, tuple[str, ...]]
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """A fault that no test noticed when the code was reviewed.

    Attributes:
        title: What it is.
        room: One of `ROOMS`.
        path: Of the file, from the folder of the package.
        pattern: Regular expression that matches one place of the file, as `ast.unparse` writes it.
        change: What stands there instead, as in `re.sub`.
    """

    title: str
    room: str
    path: str
    pattern: str
    change: str


ROOMS: dict[str, Room] = {
    "schedule": Room({"core/schedule.py": ()}, ("tests/core/test_schedule.py",)),
    "criteria": Room(
        {"pruning/importance/criteria.py": ()},
        ("tests/pruning/importance/test_criteria.py", "tests/pruning/importance/test_scores.py"),
    ),
    "gptq": Room({"quantization/grids/gptq.py": ()}, ("tests/quantization/grids/test_gptq.py",)),
    "codebook": Room(
        {"quantization/grids/codebook.py": (), "quantization/grids/kinds.py": ()},
        (
            "tests/quantization/grids/test_codebook.py",
            "tests/quantization/grids/test_kinds.py",
            "tests/quantization/grids/test_grid.py",
            "tests/quantization/grids/test_fake_quant.py",
        ),
    ),
    "regrow": Room(
        {
            "pruning/callback.py": ("on_pre_optimizer_step", "on_optimizer_step", "_mask"),
            "pruning/removal/mask.py": (),
        },
        ("tests/pruning/removal/test_mask.py", "tests/pruning/test_callback.py"),
    ),
    "selection": Room(
        {"pruning/budget/selection.py": (), "pruning/budget/plan.py": ()},
        ("tests/pruning/budget/test_plan.py", "tests/pruning/budget/test_selection.py"),
    ),
    "fused": Room(
        {"distillation/losses/fused.py": (), "distillation/losses/divergences.py": ()},
        ("tests/distillation/losses/test_divergences.py", "tests/distillation/losses/test_fused.py"),
    ),
    "report": Room(
        {
            "core/report.py": (),
            "evaluation/footprint.py": (),
            "workflows/report.py": ("build_report",),
            "workflows/plan.py": ("_removed_per_layer", "_bytes", "_stored_bytes", "_stage_lines"),
        },
        (
            "tests/core/test_report.py",
            "tests/evaluation/test_measures.py",
        ),
    ),
}

FAULTS: tuple[Fault, ...] = (
    Fault("no running mean of pruning scores", "regrow", "pruning/callback.py", r"\w+\.lerp\((\w+), [^)]*\)", r"\1"),
    Fault("regrow's memory off", "regrow", "pruning/callback.py", r"if self\.config\.regrow:", "if False:"),
    Fault("regrow's mask mode off", "regrow", "pruning/removal/mask.py", r"\w+\.reads or not readers_only", "True"),
    Fault(
        "dry run reports twice the bytes", "report", "workflows/plan.py",
        r"(bits_per_value\([^\n]*) / 8", r"\1 / 4",
    ),
    Fault(
        "GPTQ without corrections for groups that cross a block", "gptq", "quantization/grids/gptq.py",
        r"if column \+ group_size > end and column > start:", "if False:",
    ),
    Fault(
        "frozen codebooks", "codebook", "quantization/callback.py", r"if name != 'codebook':", "if True:",
    ),
    Fault("schedule one_shot acts from the start", "schedule", "core/schedule.py", r"float\(fraction >= 1\)", "1.0"),
)  # fmt: skip

EQUIVALENT: tuple[tuple[str, str, str | None, str], ...] = ()  # (path, before, after; None: any, why)
