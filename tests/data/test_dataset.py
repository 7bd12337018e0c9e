from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lit_llmers.data.dataset import TEST, TRAIN, VALID, Dataset
from lit_llmers.errors import UserError


@pytest.fixture
def dataset() -> Dataset:
    items = np.array([1, 2, 3, 2, 2, 1, 3], np.int32)
    split = np.array([TRAIN, VALID, TEST, TRAIN, TRAIN, VALID, TEST], np.uint8)
    catalogue = pd.DataFrame({"item_id": ["x", "y", "z"], "title": ["X", "Y", "Z"], "categories": "", "text": ""})
    return Dataset(items, np.array([0, 3, 7]), split, np.array(["a", "b"], dtype=object), catalogue, {"name": "tiny"})


def test_saved_and_loaded_is_the_same(dataset: Dataset, tmp_path: Path) -> None:
    dataset.save(tmp_path / "prepare")
    loaded = Dataset.load(tmp_path / "prepare")
    for name in ("items", "offsets", "split", "users"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(dataset, name))
    assert (loaded.items.dtype, loaded.offsets.dtype, loaded.split.dtype) == (np.int32, np.int64, np.uint8)
    assert isinstance(loaded.items, np.memmap)
    pd.testing.assert_frame_equal(loaded.catalogue.astype(object), dataset.catalogue.astype(object))
    assert loaded.info == dataset.info
    assert loaded.fingerprint == dataset.fingerprint
    assert (loaded.n_users, loaded.n_items) == (2, 3)
    assert sorted(p.name for p in (tmp_path / "prepare").iterdir()) == [
        "catalogue.parquet",
        "dataset.json",
        "items.npy",
        "offsets.npy",
        "split.npy",
        "users.parquet",
    ]


def test_popularity_counts_training_interactions_only(dataset: Dataset) -> None:
    assert dataset.popularity().tolist() == [0, 1, 2, 0]


def test_fingerprint_sees_order_split_and_ids(dataset: Dataset) -> None:
    parts = dict(vars(dataset))
    parts.pop("fingerprint", None)
    changed = [
        parts | {"items": dataset.items[::-1].copy()},
        parts | {"split": np.zeros_like(dataset.split)},
        parts | {"offsets": np.array([0, 4, 7])},
        parts | {"users": np.array(["a", "c"], dtype=object)},
        parts | {"catalogue": dataset.catalogue.assign(item_id=["x", "z", "y"])},
    ]
    assert len({dataset.fingerprint, *(Dataset(**p).fingerprint for p in changed)}) == 6
    assert Dataset(**(parts | {"items": dataset.items.astype(np.int64)})).fingerprint == dataset.fingerprint


def test_a_damaged_or_altered_file_is_named(dataset: Dataset, tmp_path: Path) -> None:
    dataset.save(tmp_path)
    np.save(tmp_path / "items.npy", dataset.items[::-1].copy())
    with pytest.raises(UserError, match=r"not the ones that its dataset\.json names"):
        Dataset.load(tmp_path)
    content = (tmp_path / "split.npy").read_bytes()
    (tmp_path / "split.npy").write_bytes(content[:-3])
    with pytest.raises(UserError, match="cannot be read"):
        Dataset.load(tmp_path)
    (tmp_path / "split.npy").unlink()
    with pytest.raises(UserError, match=r"split\.npy"):
        Dataset.load(tmp_path)


def test_an_interrupted_save_is_no_data_set(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset.save(tmp_path)

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    with pytest.raises(KeyboardInterrupt):
        dataset.save(tmp_path)
    with pytest.raises(UserError, match=r"dataset\.json"):
        Dataset.load(tmp_path)
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))
