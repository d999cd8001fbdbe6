"""What every test shares: quiet libraries, no Hub, real data only where it is."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

torch.set_num_threads(1)  # tiny models: threads would only wait for each other
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real datasets, from the setting HF_SLIM_DATA."""
    folder = Path(os.environ.get("HF_SLIM_DATA", "../shared/data"))
    if not folder.is_dir():
        pytest.skip(f"real datasets are not at {folder}: set HF_SLIM_DATA to a folder that holds them")
    return folder
