"""MovieLens and Amazon from their publishers, played by local files; and what is said when they cannot be reached."""

import hashlib
import json
import time
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from lit_llmers.data import DataConfig
from lit_llmers.data.sources import amazon, movielens, source_of
from lit_llmers.errors import UserError
from lit_llmers.prepare import build

GENRES = ["unknown", "Drama", "Children's"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIT_LLMERS_CACHE", str(folder))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    return folder


@pytest.fixture
def publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that plays GroupLens, with tiny archives."""
    folder = tmp_path / "grouplens"
    folder.mkdir()
    ml_100k = {
        "u.data": "2\t1\t3\t881250949\n1\t2\t5\t891717742\n1\t1\t4\t878887116\n",
        "u.genre": "".join(f"{name}|{i}\n" for i, name in enumerate(GENRES)) + "\n",
        "u.item": '1|"Noir" Caf\xe9 (1995)|01-Jan-1995||http://x|0|1|1\n2|unknown||||1|0|0\n',
    }
    ml_1m = {
        "ratings.dat": "1::1193::5::978300760\n1::661::3::978302109\n2::661::4::978298413\n",
        "movies.dat": "661::James and the Peach: A Story (1996)::Animation|Children's\n1193::Caf\xe9 (1975)::Drama\n",
    }
    for name, files in (("ml-100k", ml_100k), ("ml-1m", ml_1m)):
        publish(folder, name, files, monkeypatch)
    monkeypatch.setattr(movielens, "URL", folder.as_uri())
    return folder


def publish(folder: Path, name: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        for file, text in files.items():
            archive.writestr(f"{name}/{file}", text.encode("latin-1"))
    checksum = hashlib.md5((folder / f"{name}.zip").read_bytes()).hexdigest()
    monkeypatch.setitem(movielens.MD5, name, checksum)


def load(name: str, **settings: object):
    return source_of(DataConfig(name=name, source="movielens", **settings)).load()  # type: ignore[arg-type]


def test_ml_100k_archive(publisher: Path) -> None:
    tables = load("ml-100k", min_rating=1)
    assert tables.interactions.to_dict("list") == {
        "user_id": ["2", "1", "1"],
        "item_id": ["1", "2", "1"],
        "time": [881250949, 891717742, 878887116],
        "rating": [3, 5, 4],
    }
    assert tables.items.to_dict("list") == {
        "item_id": ["1", "2"],
        "title": ['"Noir" Café', "unknown"],
        "categories": ["Drama, Children's", "unknown"],
        "text": ["", ""],
    }


def test_ml_1m_archive(publisher: Path) -> None:
    tables = load("ml-1m")
    assert tables.interactions["item_id"].tolist() == ["1193", "661", "661"]
    assert tables.interactions["time"].tolist() == [978300760, 978302109, 978298413]
    assert tables.items["title"].tolist() == ["James and the Peach: A Story", "Café"]
    assert tables.items["categories"].tolist() == ["Animation, Children's", "Drama"]


def test_the_archive_is_fetched_once(publisher: Path, cache: Path) -> None:
    load("ml-1m")
    (publisher / "ml-1m.zip").unlink()
    load("ml-1m")
    assert [path.name for path in cache.iterdir()] == ["ml-1m.zip"]


def test_a_wrong_checksum_leaves_nothing(publisher: Path, cache: Path) -> None:
    with (publisher / "ml-1m.zip").open("ab") as archive:
        archive.write(b"more")
    with pytest.raises(UserError, match=r"ml-1m\.zip is damaged or has changed \(MD5 .* instead of"):
        load("ml-1m")
    assert not list(cache.iterdir())


def test_a_wrong_file_in_the_cache_is_named(publisher: Path, cache: Path) -> None:
    cache.mkdir()
    (cache / "ml-1m.zip").write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"cache/ml-1m\.zip is not .*Remove it"):
        load("ml-1m")


def test_no_network_says_so_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movielens, "URL", "http://127.0.0.1:9/datasets")  # nothing listens there
    begin = time.monotonic()
    with pytest.raises(UserError) as error:
        load("ml-100k")
    assert time.monotonic() - begin < 5
    message = str(error.value)
    assert "http://127.0.0.1:9/datasets/ml-100k.zip cannot be reached" in message
    assert "data.root=FOLDER" in message
    assert str(cache / "ml-100k.zip") in message
    assert not list(cache.iterdir())


def test_movielens_fingerprint_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movielens, "URL", "http://127.0.0.1:9")
    prints = [source_of(DataConfig(name=n, source="movielens")).fingerprint() for n in ("ml-100k", "ml-1m")]
    assert prints[0] != prints[1]
    assert prints[1]["md5"] == "c4d9eecfca2ab87c1945afe126590906"


def test_unknown_movielens() -> None:
    with pytest.raises(UserError, match=r"'ml-10k'\. Did you mean 'ml-100k'"):
        load("ml-10k")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIT_LLMERS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="LIT_LLMERS_CACHE"):
        load("ml-1m")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that plays the Hugging Face repository."""
    folder = tmp_path / "hub"
    (folder / "benchmark/5core/rating_only").mkdir(parents=True)
    (folder / "raw/meta_categories").mkdir(parents=True)
    (folder / "benchmark/5core/rating_only/Video_Games.csv").write_text(
        "user_id,parent_asin,rating,timestamp\nA1,B001,5.0,1600000000000\nA1,0002,4.0,1500000000000\nA2,0002,1.0,1400000000000\n"
    )
    items = [
        {"parent_asin": "B009", "title": "unwanted", "details": {"a": 1}},
        {"parent_asin": "B001", "title": "Game", "categories": ["Video Games", "PC"], "description": ["Fun.", "Much."]},
        {
            "parent_asin": "0002",
            "title": None,
            "categories": [],
            "description": [],
            "details": {"b": "x"},
            "price": "None",
        },
        {"parent_asin": "B001", "title": "Game again", "price": 3.5},
    ]
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (folder / "raw/meta_categories/meta_Video_Games.jsonl").write_text(lines)
    monkeypatch.setattr(amazon, "address", lambda file: str(folder / file))
    monkeypatch.setattr(amazon.AmazonReviews2023, "check_reachable", lambda self, cure: None)
    return folder


def games(**settings: object) -> DataConfig:
    return DataConfig(**{"name": "amazon-games", "source": "amazon", "category": "Video_Games"} | settings)  # type: ignore[arg-type]


def test_amazon_from_the_hub(hub: Path, cache: Path) -> None:
    tables = source_of(games()).load()
    assert tables.interactions.to_dict("list") == {
        "user_id": ["A1", "A1", "A2"],
        "item_id": ["B001", "0002", "0002"],
        "time": [1600000000000, 1500000000000, 1400000000000],
    }
    assert tables.items.to_dict("list") == {
        "item_id": ["B001", "0002"],
        "title": ["Game", ""],
        "categories": ["Video Games, PC", ""],
        "text": ["Fun. Much.", ""],
    }
    assert "2023 edition" in tables.info["notes"][1]
    assert "cannot be compared" in tables.info["notes"][1]
    (hub / "raw/meta_categories/meta_Video_Games.jsonl").unlink()
    pd.testing.assert_frame_equal(source_of(games()).load().items, tables.items)  # from the cache


def test_unknown_category(hub: Path) -> None:
    with pytest.raises(UserError, match=r"no category 'Video_Game'.*data\.category"):
        source_of(games(category="Video_Game")).load()


def test_hub_out_of_reach(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for offline, message in ((False, "cannot be reached"), (True, "HF_HUB_OFFLINE is set")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:9/api/datasets/.*{message}.*amazon-games with data\.root=FOLDER"):
            source_of(games()).load()
    assert not list(cache.iterdir())


def test_what_the_hub_does_not_have() -> None:
    with pytest.raises(UserError, match=r"amazon-pantry has no counterpart.*data\.root=FOLDER"):
        source_of(games(name="amazon-pantry", category=None))
    with pytest.raises(UserError, match=r"no column 'split'\. Use data\.split=leave-one-out or data\.split=temporal, or name"):
        source_of(games(split="given"))


# ---- a temporal split needs no column --------------------------------------------------------------------------------

ROWS = [("1", "10", 1), ("2", "20", 2), ("1", "20", 3), ("2", "10", 4), ("2", "20", 5), ("1", "10", 6)]


def assert_temporal(config: DataConfig) -> None:
    dataset = build(source_of(config).load(), config)
    assert dataset.info["counts"] == {"users": 2, "items": 2, "interactions": 6, "train": 4, "valid": 1, "test": 1}
    assert dataset.split.tolist() == [0, 0, 2, 0, 0, 1]


def test_a_temporal_split_of_movielens(publisher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratings = "".join(f"{user}::{item}::5::{time}\n" for user, item, time in ROWS)
    publish(publisher, "ml-1m", {"ratings.dat": ratings, "movies.dat": "10::A::Drama\n20::B::Drama\n"}, monkeypatch)
    assert_temporal(DataConfig(name="ml-1m", source="movielens", split="temporal", quantiles=[0.7, 0.9]))
    with pytest.raises(UserError, match=r"no column 'split'\. Use data\.split=leave-one-out or data\.split=temporal\."):
        load("ml-1m", split="given")


def test_a_temporal_split_of_amazon(hub: Path) -> None:
    rows = "".join(f"{user},{'B001' if item == '10' else '0002'},5.0,{time}000\n" for user, item, time in ROWS)
    (hub / "benchmark/5core/rating_only/Video_Games.csv").write_text(f"user_id,parent_asin,rating,timestamp\n{rows}")
    assert_temporal(games(split="temporal", quantiles=[0.7, 0.9]))
