from pathlib import Path

import pandas as pd
import pytest


@pytest.fixture
def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Three users and four items; user b's rows are out of order, and two of them share a time."""
    interactions = pd.DataFrame(
        {
            "user_id": ["b", "a", "a", "b", "a", "b", "c", "c", "c", "a"],
            "item_id": ["4", "1", "2", "1", "3", "2", "4", "3", "1", "4"],
            "timestamp": [30, 10, 20, 5, 25, 30, 1, 2, 3, 26],
        }
    )
    items = pd.DataFrame(
        {
            "item_id": ["1", "2", "3", "4"],
            "title": ["One", "Two, Again", "Three", "Four"],
            "genres": [["Drama"], ["Drama", "Noir"], [], ["Comedy"]],
            "plot": ["first", None, "third", "fourth"],
        }
    )
    return interactions, items


@pytest.fixture
def folder(tmp_path: Path, tables: tuple[pd.DataFrame, pd.DataFrame]) -> Path:
    path = tmp_path / "set"
    path.mkdir()
    tables[0].to_parquet(path / "interactions.parquet")
    tables[1].to_parquet(path / "items.parquet")
    return path
