"""Shared by all tests: one thread, no hub, and the reference folders beside the checkout where they exist."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import numpy as np
import pytest
import torch

pytest.register_assert_rewrite("battery")
SHARED = Path(__file__).resolve().parents[2] / "shared"
torch.set_num_threads(1)


@pytest.fixture
def golden():
    """Load `golden/<method>/<case>.npz`: numbers that the official code computed."""

    def load(case: str) -> dict[str, torch.Tensor]:
        path = SHARED / "golden" / f"{case}.npz"
        if not path.is_file():
            pytest.skip(f"the reference numbers {path} are not here")
        with np.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].dtype.kind in "fiub"}

    return load


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"the data sets {SHARED / 'data'} are not here")
    return SHARED / "data"
