"""Where the benchmark scripts lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "recipes" / "benchmarks"
NOT_A_BENCHMARK = {"tables.py"}
SCRIPTS = sorted(path for path in BENCHMARKS.glob("*.py") if path.name not in NOT_A_BENCHMARK)
