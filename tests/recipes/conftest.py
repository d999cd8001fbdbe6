"""The benchmark scripts import each other as they do when they are run: from their own folder."""

import sys

from tests.recipes.scripts import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))
