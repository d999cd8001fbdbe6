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
            "tests/quantization/test_callback_steps.py",
            "tests/quantization/grids/test_codebook.py",
            "tests/quantization/grids/test_kinds.py",
            "tests/quantization/grids/test_bitsandbytes.py",
            "tests/quantization/grids/test_grid.py",
            "tests/quantization/grids/test_fake_quant.py",
        ),
    ),
    "regrow": Room(
        {
            "pruning/callback.py": ("on_pre_optimizer_step", "on_optimizer_step", "_mask"),
            "pruning/importance/scores.py": ("averaged",),
            "pruning/removal/mask.py": (),
        },
        (
            "tests/pruning/removal/test_mask.py",
            "tests/pruning/test_callback_steps.py",
            "tests/pruning/test_callback.py",
        ),
    ),
    "selection": Room(
        {"pruning/budget/selection.py": (), "pruning/budget/plan.py": ()},
        ("tests/pruning/budget/test_selection.py", "tests/pruning/budget/test_legal_sizes.py"),
    ),
    "fused": Room(
        {"distillation/losses/fused.py": (), "distillation/losses/divergences.py": ()},
        ("tests/distillation/losses/test_divergences.py", "tests/distillation/losses/test_fused.py"),
    ),
    "report": Room(
        {
            "core/counting.py": (),
            "core/report.py": (),
            "evaluation/footprint.py": (),
            "workflows/report.py": ("build_report",),
            "workflows/plan.py": ("bytes_after", "_stage_lines"),
        },
        (
            "tests/core/test_report.py",
            "tests/core/test_counting.py",
            "tests/workflows/test_plan.py",
            "tests/evaluation/test_measures.py",
        ),
    ),
}

FAULTS: tuple[Fault, ...] = (
    Fault(
        "no running mean of pruning scores", "regrow", "pruning/importance/scores.py",
        r"\w+\.lerp\((\w+), [^)]*\)", r"\1",
    ),
    Fault("regrow's memory off", "regrow", "pruning/callback.py", r"if self\.config\.regrow else", "if False else"),
    Fault("regrow's mask mode off", "regrow", "pruning/removal/mask.py", r"\w+\.reads or not readers_only", "True"),
    Fault(
        "dry run reports twice the bytes", "report", "workflows/plan.py",
        r"(total \+= [^\n]*) / 8", r"\1 / 4",
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

_SPEED = "only how much is worked on at a time"
_NO_CORRECTION = "the group ends within the block, or nothing has been rounded in it yet: the correction is empty"
_REFINES = "a constant of the search: a little more or less only refines what it finds"
_BLOCK_BORDER = "if column + group_size > end and column > start:"
_ONE_BOOK = "with one codebook nothing is added"
_HERE = "here = indices + block * entries if books {} 1 else indices"
_CELLS_OF_BOOKS = "(cells + block * (CELLS + 1) if books {} 1 else cells)"
_INDICES = f"indices = table.index_select(0, {_CELLS_OF_BOOKS}.view(-1)).view(cells.shape)"
_MOST = "most_in_a_cell = int((edges.unsqueeze(-1) == edges.unsqueeze(-2)).sum(-1).max()) if entries > 1 else 0"
_CELLS = "return values.clamp(-1, 1).nan_to_num_(0).add_(1).mul_(CELLS / 2).int()"
# (path, before, after; None: any change of this line, why)
EQUIVALENT: tuple[tuple[str, str, str | None, str], ...] = (
    (
        "core/schedule.py", "return min(1.0, (1 + int(fraction * (rounds - 1))) / rounds)",
        "return min(2.0, (1 + int(fraction * (rounds - 1))) / rounds)", "never above 1 for a fraction up to 1",
    ),
    ("pruning/importance/criteria.py", "PIECE = 2 ** 19", None, _SPEED),
    ("pruning/importance/criteria.py", "seed: int = 0", None, "only a criterion that is given a seed looks at it"),
    (
        "pruning/importance/criteria.py", "rows = max(1, PIECE * len(permuted[0]) // max(1, first.numel()))",
        "rows = max(1, PIECE * len(permuted[0]) // max(2, first.numel()))", "one number is one piece",
    ),
    (
        "pruning/importance/criteria.py", "target = total if order.index(0) < order.index(1) else total.t()",
        "target = total if order.index(0) <= order.index(1) else total.t()", "two places are never the same",
    ),
    ("distillation/losses/fused.py", "CHUNK_BYTES = 2 ** 25", None, _SPEED),
    ("distillation/losses/fused.py", "BLOCK_BYTES = 2 ** 20", None, _SPEED),
    (
        "distillation/losses/fused.py", "for chunk in rows.split(max(1, CHUNK_BYTES // (4 * work.n_classes))):",
        "for chunk in rows.split(max(1, CHUNK_BYTES // work.n_classes)):", _SPEED,
    ),
    ("quantization/grids/gptq.py", "BLOCK = 128", None, _SPEED),
    ("quantization/grids/codebook.py", "ITERATIONS = 25", None, _REFINES),
    ("quantization/grids/codebook.py", "SAMPLE = 2 ** 18", "SAMPLE = 2 ** 19", _REFINES),
    ("quantization/grids/codebook.py", "SAMPLE = 2 ** 18", "SAMPLE = 3 ** 18", _REFINES),
    ("quantization/grids/kinds.py", "CELLS = 1024", None, _SPEED),
    ("quantization/grids/kinds.py", "in_place = True", None, "only which pieces of a weight are in work at a time"),
    (
        "quantization/grids/kinds.py", "return scaled.clamp_(*self.limits(grid)).to(torch.float8_e4m3fn)",
        "return scaled.to(torch.float8_e4m3fn)", "the cast of this torch keeps to the limits by itself",
    ),
    ("quantization/grids/kinds.py", "if books > 1:", "if books >= 1:", _ONE_BOOK),
    ("quantization/grids/kinds.py", _HERE.format(">"), _HERE.format(">="), _ONE_BOOK),
    ("quantization/grids/kinds.py", _INDICES.format(">"), _INDICES.format(">="), _ONE_BOOK),
    (
        "quantization/grids/kinds.py", "if torch.compiler.is_compiling():", "if not torch.compiler.is_compiling():",
        "both ways give the same",
    ),
    ("quantization/grids/kinds.py", _MOST, _MOST.replace("sum(-1)", "sum(-2)"), "the matrix is symmetric"),
    ("quantization/grids/kinds.py", _MOST, _MOST.replace("unsqueeze(-1)", "unsqueeze(-2)"), _SPEED),
    ("quantization/grids/kinds.py", _MOST, _MOST.replace("else 0", "else 1"), "nothing lies above infinity"),
    ("quantization/grids/kinds.py", _CELLS, _CELLS.replace("_num_(0)", "_num_(1)"), "NaN may get any entry"),
    ("quantization/grids/kinds.py", _CELLS, _CELLS.replace(".mul_(CELLS / 2)", ""), _SPEED),
    ("quantization/grids/kinds.py", _CELLS, _CELLS.replace("CELLS / 2", "2"), _SPEED),
    ("quantization/grids/kinds.py", _CELLS, _CELLS.replace("CELLS / 2", "CELLS / 3"), _SPEED),
    ("quantization/grids/kinds.py", "FLOOR_TOLERANCE = 2 ** (-12)", "FLOOR_TOLERANCE = 2 ** (-13)", _REFINES),
    ("quantization/grids/gptq.py", _BLOCK_BORDER, "if column + group_size >= end and column > start:", _NO_CORRECTION),
    ("quantization/grids/gptq.py", _BLOCK_BORDER, "if column + group_size > end and column >= start:", _NO_CORRECTION),
    ("quantization/grids/gptq.py", _BLOCK_BORDER, "if column + group_size > end or column > start:", _NO_CORRECTION),
    ("quantization/grids/gptq.py", _BLOCK_BORDER, "if column + group_size > end:", _NO_CORRECTION),
    ("quantization/grids/gptq.py", _BLOCK_BORDER, "if column > start:", _NO_CORRECTION),
)  # fmt: skip
