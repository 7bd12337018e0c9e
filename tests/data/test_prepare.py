"""From tables to a saved data set: hand-worked, and the real sets where they are."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import lit_llmers
from lit_llmers.data import Columns, DataConfig
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.dropped import dropped_lines
from lit_llmers.errors import UserError
from lit_llmers.prepare import prepare

CONFIGS = Path(lit_llmers.__file__).parent / "conf" / "data"
SHARED = Path(lit_llmers.__file__).parents[2] / "shared" / "data"
ORDER = "Order within a user: column 'timestamp'."
UNDECIDED = (  # user b's last two rows share a time
    "1 of 3 users have their test or validation item at the same time as the item before it: the order of the file decides "
    "which is held out."
)


def local(folder: Path, **settings: object) -> DataConfig:
    return DataConfig(name="local", source="folder", path=str(folder), **settings)  # type: ignore[arg-type]


def named(name: str, **settings: object) -> DataConfig:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) | settings
    return DataConfig(**config | {"columns": Columns(**config.get("columns", {}))})


def histories(dataset: Dataset) -> dict[str, list[str]]:
    ids = ["", *dataset.catalogue["item_id"]]
    parts = np.split(np.asarray(dataset.items), dataset.offsets[1:-1])
    return {user: [ids[i] for i in part] for user, part in zip(dataset.users, parts, strict=True)}


def write(folder: Path, items: dict[str, str], times: dict[str, list[int]]) -> None:
    """Make `folder` a data set of these users, with one letter for each item."""
    rows = [(user, item, time) for user in items for item, time in zip(items[user], times[user], strict=True)]
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).to_parquet(folder / "interactions.parquet")
    names = sorted(set("".join(items.values())))
    pd.DataFrame({"item_id": names, "title": names}).to_parquet(folder / "items.parquet")


def test_order_leave_one_out_and_info(folder: Path, tmp_path: Path) -> None:
    info = prepare(local(folder), tmp_path / "out")
    dataset = Dataset.load(tmp_path / "out")
    # b's rows 4 and 2 share a time: they stay in the order of the file
    assert histories(dataset) == {"b": ["1", "4", "2"], "a": ["1", "2", "3", "4"], "c": ["4", "3", "1"]}
    assert dataset.split.tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 1, 2]
    assert info == dataset.info
    assert info["counts"] == {"users": 3, "items": 4, "interactions": 10, "train": 4, "valid": 3, "test": 3}
    assert info["dropped"] == {"items_without_interactions": 0}
    assert (info["generated"], info["notes"], info["split"]) == (False, [ORDER, UNDECIDED], "leave-one-out")


def test_short_users_are_dropped_counted_and_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        info = prepare(local(folder, min_interactions=4), tmp_path / "out")
    assert info["counts"]["users"] == 1
    assert info["dropped"]["min_interactions=4"] == {"users": 2, "items": 0, "interactions": 6}
    (said,) = dropped_lines(info["dropped"])
    assert said == "Dropped, min_interactions=4: 2 users, 0 items, 6 interactions."
    assert info["notes"] == [ORDER], "and it is said once"
    assert said in caplog.text


def test_k_core_on_tables(folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    extra = pd.DataFrame({"user_id": ["d", "d", "d"], "item_id": ["5", "1", "2"], "timestamp": [1, 2, 3]})
    pd.concat([pd.read_parquet(path), extra]).to_parquet(path)
    items = pd.read_parquet(folder / "items.parquet")
    pd.concat([items, pd.DataFrame({"item_id": ["5", "6"], "title": ["Five", "Six"]})]).to_parquet(folder / "items.parquet")
    info = prepare(local(folder, k_core=2), tmp_path / "out")
    # item 5 has one interaction; without it user d has two, fewer than min_interactions
    assert info["dropped"]["k_core=2"] == {"users": 1, "items": 1, "interactions": 3}
    assert info["dropped"]["items_without_interactions"] == 2
    assert Dataset.load(tmp_path / "out").catalogue["title"].tolist() == ["One", "Two, Again", "Three", "Four"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"min_interactions": 9},
            "after the filter min_interactions=9; before it there were 10 interactions of 3 users with 4 items",
        ),
        ({"k_core": 4}, "after the filter k_core=4; before it there were 10 interactions"),
        ({"min_rating": 6}, "after the filter min_rating=6; before it there were 10 interactions"),
    ],
)
def test_nothing_left_names_the_filter(settings: dict, message: str, folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    pd.read_parquet(path).assign(rating=5).to_parquet(path)
    with pytest.raises(UserError, match=message):
        prepare(local(folder, **settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_interactions_at_all(folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    pd.read_parquet(path).iloc[:0].to_parquet(path)
    with pytest.raises(UserError, match="has no interactions"):
        prepare(local(folder), tmp_path / "out")


def test_min_rating(folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    pd.read_parquet(path).assign(rating=[5, 4, 4, 4, 4, 4, 4, 4, 4, 3]).to_parquet(path)
    info = prepare(local(folder, min_rating=4), tmp_path / "out")
    assert info["dropped"]["min_rating=4"] == {"users": 0, "items": 0, "interactions": 1}
    assert histories(Dataset.load(tmp_path / "out"))["a"] == ["1", "2", "3"]


def test_what_was_dropped_is_said_once_and_in_the_order_of_the_filters(folder: Path, tmp_path: Path) -> None:
    read = {"a": "xyz", "b": "xyz", "c": "xyzw", "d": "xyv"}
    write(folder, read, {user: list(range(len(items))) for user, items in read.items()})
    path = folder / "interactions.parquet"
    table = pd.read_parquet(path)
    table.assign(rating=[1 if item == "v" else 5 for item in table["item_id"]]).to_parquet(path)
    items = pd.DataFrame({"item_id": list("xyzwvu"), "title": list("xyzwvu")})
    items.to_parquet(folder / "items.parquet")
    prepare(local(folder, min_rating=4, k_core=2), tmp_path / "out")
    assert dropped_lines(Dataset.load(tmp_path / "out").info["dropped"]) == [  # u, v, d, w
        "Dropped, items that nobody has met: 1.",
        "Dropped, min_rating=4: 0 users, 1 items, 1 interactions.",
        "Dropped, min_interactions=3: 1 users, 0 items, 2 interactions.",
        "Dropped, k_core=2: 0 users, 1 items, 1 interactions.",
    ]


def test_given_split(folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    parts = ["test", "train", "train", "train", "valid", "test", "valid", "test", "test", "test"]
    pd.read_parquet(path).assign(split=parts).to_parquet(path)
    info = prepare(local(folder, split="given"), tmp_path / "out")
    dataset = Dataset.load(tmp_path / "out")
    assert histories(dataset) == {"b": ["1", "4", "2"], "a": ["1", "2", "3", "4"]}
    assert dataset.split.tolist() == [0, 2, 2, 0, 0, 1, 2]
    assert info["notes"] == [ORDER]
    assert dropped_lines(info["dropped"]) == [
        "Dropped, split=given (users without a training interaction): 1 users, 0 items, 3 interactions."
    ]
    assert info["counts"] == {"users": 2, "items": 4, "interactions": 7, "train": 3, "valid": 1, "test": 3}


def test_a_given_split_orders_what_happened_at_one_time(folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    parts = ["test", "valid", "train", "train", "test", "valid", "valid", "test", "train", "test"]
    pd.read_parquet(path).assign(split=parts, timestamp=7).to_parquet(path)
    prepare(local(folder, split="given"), tmp_path / "out")
    dataset = Dataset.load(tmp_path / "out")
    assert histories(dataset) == {"b": ["1", "2", "4"], "a": ["2", "1", "3", "4"], "c": ["1", "4", "3"]}
    assert dataset.split.tolist() == [0, 1, 2, 0, 1, 2, 2, 0, 1, 2]


def test_given_split_without_training(folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    pd.read_parquet(path).assign(split="test").to_parquet(path)
    with pytest.raises(UserError, match=r"after the filter split=given \(users without a training interaction\)"):
        prepare(local(folder, split="given"), tmp_path / "out")


def test_temporal_split_drops_what_training_does_not_know(folder: Path, tmp_path: Path) -> None:
    # times in order: c 1, 2, 3; b 5; a 10, 20, 25, 26; b 30, 30. Before 20 there is no item 2, and every user is known
    info = prepare(local(folder, split="temporal", quantiles=[0.5, 0.7]), tmp_path / "out")
    dataset = Dataset.load(tmp_path / "out")
    assert histories(dataset) == {"b": ["1", "4"], "a": ["1", "3", "4"], "c": ["4", "3", "1"]}
    assert dataset.split.tolist() == [0, 2, 0, 1, 2, 0, 0, 0]
    assert info["notes"] == [
        ORDER,
        "Training before time 20, validation before 26, test from there on.",
    ]
    assert info["dropped"]["split=temporal (items without a training interaction)"] == {
        "users": 0,
        "items": 1,
        "interactions": 2,
    }
    assert dataset.catalogue["title"].tolist() == ["One", "Three", "Four"], "the unknown item leaves the catalogue"


def test_temporal_split_drops_users_who_come_later(folder: Path, tmp_path: Path) -> None:
    write(folder, {"b": "xxyx", "a": "yxz", "c": "xzzz"}, {"b": [1, 4, 9, 10], "a": [5, 6, 9], "c": [2, 3, 5, 11]})
    prepare(local(folder, split="temporal", quantiles=[0.45, 0.7]), tmp_path / "out")
    dataset = Dataset.load(tmp_path / "out")
    assert histories(dataset) == {"b": ["x", "x", "x"], "c": ["x", "z", "z", "z"]}
    assert dropped_lines(dataset.info["dropped"]) == [  # y is of user a, who is unknown, and of b
        "Dropped, split=temporal (users without a training interaction): 1 users, 0 items, 3 interactions.",
        "Dropped, split=temporal (items without a training interaction): 0 users, 1 items, 1 interactions.",
    ]


def test_temporal_split_leaks_nothing_across_time(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = {f"u{user}": "".join(rng.permutation(list("abcdefghijklmnopqrst"))[: rng.integers(3, 15)]) for user in range(40)}
    times = {user: rng.integers(0, 300, len(items)).tolist() for user, items in names.items()}
    write(folder, names, times)
    prepare(local(folder, split="temporal"), tmp_path / "out")
    dataset = Dataset.load(tmp_path / "out")
    when = {(user, item): time for user in names for item, time in zip(names[user], times[user], strict=True)}
    moments = [[when[user, item] for item in items] for user, items in histories(dataset).items()]
    assert all(each == sorted(each) for each in moments)
    parts = [np.concatenate(moments)[dataset.split == part] for part in (0, 1, 2)]
    assert min(map(len, parts)) > 10
    assert parts[0].max() < parts[1].min() <= parts[1].max() < parts[2].min()
    assert len(parts[0]) == sum(time <= parts[0].max() for time in when.values()), "training is whole"
    known = dataset.items[dataset.split == 0]
    assert set(dataset.items.tolist()) == set(known.tolist())


def test_temporal_split_of_positions_names_the_column(folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    table = pd.read_parquet(path)
    table.assign(timestamp=table.groupby("user_id").cumcount()).to_parquet(path)
    with pytest.raises(UserError, match=r"positions within a user.*data\.columns\.time=NAME"):
        prepare(local(folder, split="temporal"), tmp_path / "out")


def test_temporal_split_does_not_take_positions_by_itself(folder: Path, tmp_path: Path) -> None:
    """These begin at different numbers, so they might be moments; only their user knows."""
    path = folder / "interactions.parquet"
    pd.read_parquet(path).rename(columns={"timestamp": "position"}).to_parquet(path)
    settings = {"split": "temporal", "quantiles": [0.5, 0.7]}
    with pytest.raises(UserError, match=r"'position' was taken for the order .* data\.columns\.time=NAME, or use"):
        prepare(local(folder, **settings), tmp_path / "out")
    info = prepare(local(folder, columns=Columns(time="position"), **settings), tmp_path / "out")
    assert info["notes"][0] == "Order within a user: column 'position'."


@pytest.mark.parametrize("time", [None, "timestamp"])
def test_position_orders_what_happened_at_one_time(time: str | None, folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    table = pd.read_parquet(path)
    table["position"] = range(len(table), 0, -1)  # user b's rows 4 and 2 share a time, and 2 has the lower position
    table.to_parquet(path)
    info = prepare(local(folder, columns=Columns(time=time)), tmp_path / "out")
    assert histories(Dataset.load(tmp_path / "out")) == {"b": ["1", "2", "4"], "a": ["1", "2", "3", "4"], "c": ["4", "3", "1"]}
    assert info["notes"] == ["Order within a user: column 'timestamp', at the same time column 'position'."]
    table.assign(position=7).to_parquet(path)
    assert prepare(local(folder, columns=Columns(time=time)), tmp_path / "alike")["notes"][1:] == [UNDECIDED]
    table.assign(position=["top", *range(9)]).astype({"position": str}).to_parquet(path)
    assert prepare(local(folder, columns=Columns(time=time)), tmp_path / "words")["notes"] == [ORDER, UNDECIDED]


@pytest.mark.parametrize("part", ["validation", "test"])
def test_an_empty_part_of_a_temporal_split(part: str, folder: Path, tmp_path: Path) -> None:
    if part == "validation":  # both moments are time 4
        write(folder, {"b": "xyx", "a": "yxy", "c": "xyx"}, {"b": [1, 3, 4], "a": [2, 4, 4], "c": [3, 4, 5]})
    else:  # from time 7 on all is of item z, which training does not know
        write(folder, {"b": "xyz", "a": "yxz", "c": "xyz"}, {"b": [1, 2, 7], "a": [3, 5, 8], "c": [4, 6, 9]})
    with pytest.raises(UserError, match=f"The {part} part of 'local' is empty .* Move data.quantiles"):
        prepare(local(folder, split="temporal", quantiles=[0.5, 0.75]), tmp_path / "out")


@pytest.mark.parametrize(("part", "label"), [("validation", "test"), ("test", "valid")])
def test_an_empty_part_of_a_given_split(part: str, label: str, folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    last = [True, False, False, False, False, True, False, False, True, True]
    pd.read_parquet(path).assign(split=[label if held else "train" for held in last]).to_parquet(path)
    with pytest.raises(UserError, match=f"The {part} part of 'local' is empty .* Correct the column 'split'"):
        prepare(local(folder, split="given"), tmp_path / "out")


def test_a_given_split_of_other_users_says_why_its_part_is_empty(folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    table = pd.read_parquet(path)
    table.assign(split=table["user_id"].map({"a": "train", "b": "valid", "c": "test"})).to_parquet(path)
    message = r"The validation part .* All 3 interactions there are of users without a training interaction.* earlier"
    with pytest.raises(UserError, match=message) as error:
        prepare(local(folder, split="given"), tmp_path / "out")
    assert "Correct the column" not in str(error.value)


@pytest.mark.parametrize("empty", [None, float("nan"), ""])
def test_an_interaction_without_a_part_is_named_by_its_row(empty: object, folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    parts = ["test", "train", empty, "train", "valid", "test", "valid", "test", empty, "test"]
    pd.read_parquet(path).assign(split=parts).to_parquet(path)
    with pytest.raises(UserError, match=r"column 'split' is empty \(NaN or blank\) in 2 rows, first in row 3"):
        prepare(local(folder, split="given"), tmp_path / "out")


def test_a_catalogue_of_one_item(folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    pd.read_parquet(path).assign(item_id="1").to_parquet(path)
    with pytest.raises(UserError, match="'local' has one item: there is nothing to rank"):
        prepare(local(folder), tmp_path / "out")


def test_repeated_items_are_kept_and_said(folder: Path, tmp_path: Path) -> None:
    path = folder / "interactions.parquet"
    pd.read_parquet(path).assign(item_id=["1"] * 2 + ["2", "1", "3", "2", "4", "3", "1", "4"]).to_parquet(path)
    info = prepare(local(folder), tmp_path / "out")
    assert info["notes"] == [ORDER, UNDECIDED, "1 interactions repeat an item that the user had before; they are kept."]
    assert info["counts"]["interactions"] == 10


def test_rows_that_stand_twice_and_items_without_title_are_said(folder: Path, tmp_path: Path) -> None:
    table = pd.read_parquet(folder / "interactions.parquet")
    pd.concat([table, table.iloc[:2]]).to_parquet(folder / "interactions.parquet")
    items = pd.read_parquet(folder / "items.parquet")
    items.loc[0, "title"] = None
    items.loc[1, "title"] = " "
    items.to_parquet(folder / "items.parquet")
    assert prepare(local(folder), tmp_path / "out")["notes"] == [
        ORDER,
        UNDECIDED,
        "2 interactions repeat an item that the user had before, 2 of them at the same time; they are kept.",
        f"2 of {len(items)} items have no title.",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "moveilens"}, "Unknown data.source 'moveilens'. Did you mean 'movielens'"),
        ({"split": "leave_one_out"}, "Unknown data.split 'leave_one_out'. Did you mean 'leave-one-out'"),
        ({"min_interactions": 2}, r"data\.min_interactions is 2.*at least 3"),
        ({"k_core": -1}, r"data\.k_core is -1"),
        ({"quantiles": [0.9, 0.8]}, r"data\.quantiles is \[0\.9, 0\.8\]\. It must be two ascending"),
        ({"quantiles": [0.9]}, r"data\.quantiles is \[0\.9\]"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_config_is_valid_and_named_after_its_file(name: str) -> None:
    assert named(name).name == name


@pytest.mark.parametrize(
    ("name", "users", "items", "interactions", "train", "valid", "test"),
    [
        ("ml-100k", 943, 1682, 100000, 98114, 943, 943),
        ("ml-1m", 6040, 3706, 1000209, 988129, 6040, 6040),
        ("amazon-beauty", 22363, 12101, 198502, 153776, 22363, 22363),
        ("amazon-games", 49156, 17332, 342329, 299987, 22609, 19733),
        ("amazon-pantry", 12871, 8347, 115004, 89262, 12871, 12871),
    ],
)
def test_published_counts(
    name: str, users: int, items: int, interactions: int, train: int, valid: int, test: int, tmp_path: Path
) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not there")
    info = prepare(named(name, root=str(SHARED)), tmp_path)
    counts = {
        "users": users,
        "items": items,
        "interactions": interactions,
        "train": train,
        "valid": valid,
        "test": test,
    }
    assert info["counts"] == counts
    dataset = Dataset.load(tmp_path)
    steps = np.diff(dataset.split.astype(int))
    steps[dataset.offsets[1:-1] - 1] = 0
    assert steps.min() >= 0
    assert (dataset.catalogue["title"] != "").all()
    assert dataset.items.min() == 1
    assert dataset.items.max() == dataset.n_items
    assert (np.bincount(dataset.items)[1:] > 0).all()


def test_ml_100k_last_item_is_the_latest(tmp_path: Path) -> None:
    if not (SHARED / "ml-100k").is_dir():
        pytest.skip(f"{SHARED / 'ml-100k'} is not there")
    prepare(named("ml-100k", root=str(SHARED)), tmp_path)
    dataset = Dataset.load(tmp_path)
    rows = pd.read_parquet(SHARED / "ml-100k" / "interactions.parquet")
    expected = rows.sort_values(["user_id", "timestamp"], kind="stable").groupby("user_id")["item_id"].last()
    last = {user: items[-1] for user, items in histories(dataset).items()}
    assert last == {str(user): str(item) for user, item in expected.items()}
    toy_story = dataset.catalogue.set_index("item_id").loc["1"]
    assert (toy_story["title"], toy_story["categories"]) == ("Toy Story", "Animation, Children's, Comedy")
    assert toy_story["text"].startswith("A cowboy doll")
