"""Texts of an LLM beside the interactions: read where asked for, and nothing changes where not."""

import json
from pathlib import Path

import pandas as pd
import pytest

from lit_llmers.data import DataConfig
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.sources import source_of
from lit_llmers.errors import UserError
from lit_llmers.files import sha256
from lit_llmers.prepare import prepare

ITEM, USER = "llm_item_knowledge", "llm_user_profile"


@pytest.fixture
def written(folder: Path) -> Path:
    """The data set with a text about items and one about users; each lacks one and knows a stranger."""
    items = pd.DataFrame({"item_id": [4, 2, 1, 99], "llm_text": ["about four", " about two\n", None, "stranger"]})
    items.to_parquet(folder / f"{ITEM}.parquet")
    users = pd.DataFrame(
        {"user_id": ["c", "a", "z"], "profile": ["likes threes", "likes ones", "stranger"], "flagged": [True] * 3}
    )
    users.to_parquet(folder / f"{USER}.parquet")
    return folder


def config(folder: Path, *texts: str, **settings: object) -> DataConfig:
    return DataConfig(name="local", source="folder", path=str(folder), texts=list(texts), **settings)  # type: ignore[arg-type]


def made(folder: Path, tmp_path: Path, *texts: str, **settings: object) -> Dataset:
    prepare(config(folder, *texts, **settings), tmp_path / "out")
    return Dataset.load(tmp_path / "out")


def test_texts_stand_beside_the_items_and_users_they_are_about(written, tmp_path):
    data = made(written, tmp_path, ITEM, USER)
    assert dict(zip(data.catalogue["item_id"], data.catalogue[ITEM], strict=True)) == {
        "1": "",
        "2": "about two",
        "3": "",
        "4": "about four",
    }
    assert data.user_texts is not None
    assert dict(zip(data.users, data.user_texts[USER], strict=True)) == {"b": "", "a": "likes ones", "c": "likes threes"}
    assert data.info["texts"] == {ITEM: {"of": "items", "leaks": True}, USER: {"of": "users", "leaks": True}}
    assert data.info["notes"][1:3] == [
        f"{ITEM}: texts of 2 of 4 items. They may have been written with held-out items in view.",
        f"{USER}: texts of 2 of 3 users. They may have been written with held-out items in view.",
    ]


def test_users_that_are_dropped_lose_their_texts(written, tmp_path):
    data = made(written, tmp_path, USER, min_interactions=4)
    assert data.user_texts is not None
    assert data.user_texts[USER].tolist() == ["likes ones"]


def test_nothing_changes_where_no_text_is_asked_for(written, folder, tmp_path):
    plain, other = made(written, tmp_path / "a"), made(written, tmp_path / "b", ITEM, USER)
    assert plain.user_texts is None
    assert list(plain.catalogue) == ["item_id", "title", "categories", "text"]
    assert "texts" not in plain.info
    assert plain.fingerprint == other.fingerprint, "texts do not name the interactions"
    assert set(source_of(config(written)).fingerprint()["files"]) == {"interactions", "items"}
    names = sorted(path.name for path in (tmp_path / "a/out").iterdir())
    assert names == ["catalogue.parquet", "dataset.json", "items.npy", "offsets.npy", "split.npy", "users.parquet"]


def test_the_text_s_content_names_the_prepared_data(written):
    before = source_of(config(written, ITEM)).fingerprint()
    frame = pd.read_parquet(written / f"{ITEM}.parquet")
    frame.assign(llm_text="other").to_parquet(written / f"{ITEM}.parquet")
    other = source_of(config(written, ITEM)).fingerprint()
    (written / f"{ITEM}.json").write_text('{"made_from": "interactions"}')
    assert len({str(each) for each in (before, other, source_of(config(written, ITEM)).fingerprint())}) == 3


@pytest.mark.parametrize(
    ("beside", "given", "leaks"),
    [
        ("interactions", None, True),
        ("attributes", None, False),
        (None, None, True),
        (None, "attributes", False),
        (None, "interactions", True),
        ("attributes", "attributes", False),
        ("attributes", "interactions", True),
        ("interactions", "attributes", True),
    ],
)
def test_a_text_of_items_leaks_unless_it_is_said_to_be_made_from_attributes(written, tmp_path, beside, given, leaks):
    if beside is not None:
        (written / f"{ITEM}.json").write_text(json.dumps({"made_from": beside, "model": "some LLM"}))
    data = made(written, tmp_path, ITEM, made_from={} if given is None else {ITEM: given})
    assert data.info["texts"][ITEM]["leaks"] is leaks
    assert ("held-out items" in data.info["notes"][1]) is leaks


def test_prepared_data_of_a_silent_text_are_not_those_of_before_it_counted_as_leaking(written):
    """And those of a text that is said not to leak are."""
    path = written / f"{ITEM}.parquet"

    def found(**settings):
        return source_of(config(written, ITEM, **settings)).fingerprint()["files"]["texts"][ITEM]

    assert found() == [sha256(path), "leaks"]
    assert found(made_from={ITEM: "attributes"}) == [sha256(path)]
    (written / f"{ITEM}.json").write_text('{"made_from": "interactions"}')
    assert found() == [sha256(path), sha256(written / f"{ITEM}.json")]
    assert source_of(config(written, USER)).fingerprint()["files"]["texts"][USER] == [sha256(written / f"{USER}.parquet")]


def test_the_text_s_column_is_the_only_one_with_words(written, tmp_path):
    frame = pd.DataFrame({"item_id": ["4", "2"], "rating": [1.5, 2.5], "remark": ["x", "y"]})
    frame.to_csv(written / "llm_item_remark.csv", index=False)
    pd.DataFrame({"item_id": ["4"], "rating": [1.5], "remark": ["x"]}).to_parquet(written / "llm_item_short.parquet")
    assert made(written, tmp_path, "llm_item_short").catalogue["llm_item_short"].tolist() == ["", "", "", "x"]
    with pytest.raises(
        UserError, match=r"llm_item_remark\.csv has no column of the names llm_text, .*, and 2 others that hold"
    ):
        made(written, tmp_path, "llm_item_remark")


def test_wrong_files(written, tmp_path):
    with pytest.raises(UserError, match=rf"Unknown text \(data.texts\) of .* 'llm_item_knowlegde'. Did you mean '{ITEM}'"):
        made(written, tmp_path, "llm_item_knowlegde")
    frame = pd.read_parquet(written / f"{ITEM}.parquet")
    pd.concat([frame, frame[:1]]).to_parquet(written / "llm_item_twice.parquet")
    with pytest.raises(UserError, match=r"llm_item_twice\.parquet: id '4' occurs more than once in column 'item_id'"):
        made(written, tmp_path, "llm_item_twice")
    frame.rename(columns={"item_id": "asin"}).to_parquet(written / "llm_item_asin.parquet")
    with pytest.raises(UserError, match=r"llm_item_asin\.parquet has no column 'item_id'. It has: asin, llm_text"):
        made(written, tmp_path, "llm_item_asin")
    for name, other in {
        "llm_item_strange": {"item_id": "x" + frame["item_id"].astype(str)},
        "llm_item_empty": {"llm_text": " "},
    }.items():
        frame.assign(**other).to_parquet(written / f"{name}.parquet")
        with pytest.raises(UserError, match=rf"{name}\.parquet has no text for any item_id of the data, .*leave {name} out"):
            made(written, tmp_path, name)
    people = pd.read_parquet(written / f"{USER}.parquet")
    people.assign(llm_text="").to_parquet(written / "llm_user_empty.parquet")
    with pytest.raises(UserError, match=r"llm_user_empty\.parquet has no text for any user_id"):
        made(written, tmp_path, "llm_user_empty")
    (written / f"{ITEM}.json").write_text('{"made_from": "interaction"}')
    with pytest.raises(UserError, match="Unknown 'made_from' .* 'interaction'. Did you mean 'interactions'"):
        made(written, tmp_path, ITEM)


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["profile"], "data.texts has 'profile'. A file of texts is called"), ([ITEM, ITEM], "names a text twice")],
)
def test_wrong_settings(texts, message):
    with pytest.raises(UserError, match=message):
        DataConfig(texts=texts)


def test_a_wrong_origin():
    with pytest.raises(UserError, match=r"Unknown origin of a text \(data.made_from.llm_item_knowledge\) 'attribute'. Did you"):
        DataConfig(texts=[ITEM], made_from={ITEM: "attribute"})
    with pytest.raises(UserError, match=f"data.made_from has '{USER}'. It is about texts of items"):
        DataConfig(texts=[USER], made_from={USER: "attributes"})


@pytest.mark.parametrize("settings", [{"source": "demo"}, {"source": "movielens", "name": "ml-1m"}])
def test_a_source_without_texts(settings):
    with pytest.raises(
        UserError, match=r"data\.texts=\['llm_item_knowledge'\] are files beside the interactions.*data\.root=FOLDER"
    ):
        source_of(DataConfig(texts=[ITEM], **settings))


def test_texts_of_real_data_sets(real_data, tmp_path):
    texts = ["llm_item_knowledge_colakg", "llm_item_summary_agent4rec", "llm_user_profile_llama3"]
    settings = DataConfig(name="ml-1m", source="movielens", root=str(real_data), texts=texts)
    info = prepare(settings, tmp_path)
    data = Dataset.load(tmp_path)
    assert info["texts"]["llm_user_profile_llama3"]["leaks"]
    one = data.catalogue.set_index("item_id").loc["1"]
    assert one["llm_item_knowledge_colakg"].startswith('"Toy Story (1995)" is a pioneering animated film')
    assert one["llm_item_summary_agent4rec"] == "A group of toys embarks on a thrilling adventure to save their owner."
    assert data.user_texts is not None
    assert data.user_texts[texts[2]].str.len().min() > 0
    assert data.user_texts[texts[2]][data.users == "2"].iloc[0].startswith("Based on the user's favorite movies")
