from pathlib import Path

import pytest
from tiny_text import KINDS, save_model


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """A folder for each kind of tiny language model."""
    return {kind: save_model(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}
