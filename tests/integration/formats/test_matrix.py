"""Every format that accepts a model gives it back bit for bit, and writes the same bytes a second time.

A run tries some cells of the matrix, chosen by a seed that it prints; HF_SLIM_FULL_MATRIX=1 tries all of them, and
HF_SLIM_MATRIX_SEED=<number> those of a seed.
"""

import os
import random

import pytest
import torch

from hf_slim.core.errors import SlimConfigError
from hf_slim.integration.config_json import save_as_
from hf_slim.integration.formats.format import FORMATS
from tests import tiny
from tests.integration.formats.cells import DTYPES, FAMILIES, Cell, cells, some_cells, written

FULL = os.environ.get("HF_SLIM_FULL_MATRIX") == "1"
# GPT-2 has Conv1D layers; T5 reads weights while it is loaded, and keeps some in float32
NARROW = {"gpt2": {"slim", "bitsandbytes"}, "t5": {"slim"}}
CELLS = 2  # of each family and dtype in an ordinary run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_format_accepts_comes_back_bit_for_bit(family, dtype, tmp_path):
    seed = int(os.environ.get("HF_SLIM_MATRIX_SEED") or random.SystemRandom().randrange(2**32))
    print(f"HF_SLIM_MATRIX_SEED={seed}")
    chosen = cells(family, dtype) if FULL else some_cells(family, dtype, CELLS, seed)
    accepted = [check(cell, tmp_path / str(number)) for number, cell in enumerate(chosen)]
    assert all("slim" in names for names in accepted)
    if FULL:
        assert {name for names in accepted for name in names} == NARROW.get(family, set(FORMATS))


def check(cell: Cell, folder) -> list[str]:
    """The formats that accepted the model of a cell."""
    model = cell.model()
    expected, accepted = tiny.output(model), []
    for name in FORMATS:
        try:
            save_as_(model, name)
        except SlimConfigError:
            continue
        accepted.append(name)
        first, second, third = (folder / name / part for part in ("first", "second", "third"))
        model.save_pretrained(first)
        loaded, found = type(model).from_pretrained(first, output_loading_info=True)
        assert not any(found.values()), (cell, name, found)
        assert loaded.config.quantization_config.save_format == name
        loaded.save_pretrained(second)
        assert torch.equal(tiny.output(loaded), expected), (cell, name)
        loaded.save_pretrained(third)
        assert written(first) == written(second) == written(third), (cell, name)
    assert torch.equal(tiny.output(model), expected)
    return accepted
