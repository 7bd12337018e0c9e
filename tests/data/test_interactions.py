"""What a folder may hold, and what is said of a folder that is wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lit_llmers.data import Columns, DataConfig
from lit_llmers.data.interactions import folder_fingerprint, read_folder
from lit_llmers.data.sources import source_of
from lit_llmers.errors import UserError

COLUMNS = Columns(categories=["genres"], text=["plot"])


def rewrite(folder: Path, kind: str, **columns: object) -> None:
    path = folder / f"{kind}.parquet"
    pd.read_parquet(path).assign(**columns).to_parquet(path)


def values(frame: pd.DataFrame) -> dict[str, list[object]]:
    return {name: frame[name].tolist() for name in frame}


def test_parquet(folder: Path) -> None:
    tables = read_folder(folder, COLUMNS)
    assert values(tables.items) == {
        "item_id": ["1", "2", "3", "4"],
        "title": ["One", "Two, Again", "Three", "Four"],
        "categories": ["Drama", "Drama, Noir", "", "Comedy"],
        "text": ["first", "", "third", "fourth"],
    }
    assert tables.interactions["user_id"].tolist()[:3] == ["b", "a", "a"]
    assert tables.interactions["time"].tolist()[:3] == [30, 10, 20]


FORMS = ("csv", "semicolons", "tabs", "jsonl", "recbole")


def write(form: str, folder: Path, interactions: pd.DataFrame, items: pd.DataFrame, **kinds: str) -> None:
    """Write the tables as `form`; `kinds` are RecBole's kinds of columns that are no tokens."""
    folder.mkdir()
    if form == "jsonl":
        interactions.to_json(folder / "interactions.jsonl", orient="records", lines=True)
        items.to_json(folder / "items.jsonl", orient="records", lines=True)
        return
    mark = {"csv": ",", "semicolons": ";"}.get(form, "\t")
    list_mark = " " if form == "recbole" else "|"
    items = items.map(lambda cell: list_mark.join(cell) if isinstance(cell, list) else cell)
    names = ("interactions.csv", "items.csv")
    if form == "recbole":
        names = ("shop.inter", "shop.item")
        head = {name: f"{name}:{kinds.get(name, 'token')}" for name in (*interactions, *items)}
        interactions, items = interactions.rename(columns=head), items.rename(columns=head)
    interactions.to_csv(folder / names[0], index=False, sep=mark)
    items.to_csv(folder / names[1], index=False, sep=mark)


@pytest.mark.parametrize("form", FORMS)
def test_other_formats_say_the_same_as_parquet(form: str, folder: Path, tmp_path: Path, tables: tuple) -> None:
    names = {
        "user_id": "who",
        "item_id": "what",
        "timestamp": "when",
        "title": "name",
        "genres": "kinds",
        "plot": "story",
    }
    kinds = {"when": "float", "name": "token_seq", "kinds": "token_seq", "story": "token_seq"}
    write(form, tmp_path / form, *(table.rename(columns=names) for table in tables), **kinds)
    columns = Columns(user="who", item="what", time="when", title="name", categories=["kinds"], text=["story"])
    expected, found = read_folder(folder, COLUMNS), read_folder(tmp_path / form, columns)
    assert values(found.items) == values(expected.items)
    assert values(found.interactions) == values(expected.interactions)


@pytest.mark.parametrize("index", ["user_id", "item_id", ["user_id", "timestamp"]])
def test_an_index_of_pandas_is_a_column(index: str | list[str], folder: Path) -> None:
    expected = read_folder(folder, COLUMNS)
    for kind, of_kind in (("interactions", index), ("items", "item_id")):
        path = folder / f"{kind}.parquet"
        pd.read_parquet(path).set_index(of_kind).to_parquet(path)
    found = read_folder(folder, COLUMNS)
    assert values(found.interactions) == values(expected.interactions)
    assert values(found.items) == values(expected.items)


def test_text_that_parquet_does_not_mark_as_such_is_text(folder: Path) -> None:
    expected = read_folder(folder, COLUMNS)
    for path in folder.glob("*.parquet"):
        frame = pd.read_parquet(path)
        texts = [name for name in frame if isinstance(frame[name][0], str)]
        assert texts
        frame.assign(**{name: frame[name].str.encode("utf-8") for name in texts}).to_parquet(path)
    found = read_folder(folder, COLUMNS)
    assert values(found.interactions) == values(expected.interactions)
    assert values(found.items) == values(expected.items)


def test_ids_keep_leading_zeros_and_words_that_look_like_nothing(tmp_path: Path) -> None:
    (tmp_path / "interactions.csv").write_text("user_id,item_id,position\nnull,007,0\nNA,7,1\n")
    (tmp_path / "items.csv").write_text("item_id,title\n007,Bond\n7,Seven\n")
    tables = read_folder(tmp_path, Columns())
    assert tables.interactions["user_id"].tolist() == ["null", "NA"]
    assert tables.interactions["item_id"].tolist() == ["007", "7"]
    (tmp_path / "interactions.csv").unlink()
    (tmp_path / "interactions.jsonl").write_text('{"user_id": "01", "item_id": "007", "timestamp": 1400000000}\n')
    assert read_folder(tmp_path, Columns()).interactions.iloc[0].tolist() == ["01", "007", 1400000000]


@pytest.mark.parametrize(("first", "second"), [("2026-05-17", 1778976000), ("1969-12-27", -5 * 86400)])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns", "text", "date"])
def test_dates_are_seconds(unit: str, first: str, second: int, folder: Path) -> None:
    dates = pd.Series(pd.date_range(first, periods=10, freq="D"))
    written = {"text": dates.dt.strftime("%Y-%m-%d"), "date": dates.dt.date}
    rewrite(folder, "interactions", timestamp=written[unit] if unit in written else dates.astype(f"datetime64[{unit}]"))
    time = read_folder(folder, COLUMNS).interactions["time"]
    assert time.tolist() == [second + 86400 * day for day in range(10)]


@pytest.mark.parametrize("placeholder", ["0001-01-01", "1600-01-01", "9999-12-31"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "text", "date"])
def test_dates_that_stand_for_none_are_seconds_too(unit: str, placeholder: str, folder: Path) -> None:
    """Nanoseconds since 1970 do not reach so far."""
    texts = np.array([placeholder, *["2026-05-17"] * 9])
    dates = {"text": texts, "date": texts.astype("datetime64[D]").tolist()}
    rewrite(folder, "interactions", timestamp=dates[unit] if unit in dates else texts.astype(f"datetime64[{unit}]"))
    days = int((np.datetime64(placeholder) - np.datetime64("1970-01-01")).astype(int))
    assert read_folder(folder, COLUMNS).interactions["time"].tolist() == [86400 * days, *[1778976000] * 9]


def test_parts_of_a_second_are_kept(folder: Path) -> None:
    times = [f"2026-05-17T00:00:00.{part:06d}" for part in range(10)]
    rewrite(folder, "interactions", timestamp=times)
    assert read_folder(folder, COLUMNS).interactions["time"].tolist() == [1778976000 + part / 1e6 for part in range(10)]


def test_integers_and_whole_floats_are_the_same_id(folder: Path) -> None:
    rewrite(folder, "interactions", item_id=np.array([4, 1, 2, 1, 3, 2, 4, 3, 1, 4], dtype=float))
    rewrite(folder, "items", item_id=np.array([1, 2, 3, 4], dtype=np.int32))
    assert read_folder(folder, COLUMNS).interactions["item_id"].tolist()[:2] == ["4", "1"]


def test_categories_and_texts_are_found_or_left_out(folder: Path) -> None:
    found = read_folder(folder, Columns()).items
    assert (found["categories"][1], found["text"][0]) == ("Drama, Noir", "first")
    none = read_folder(folder, Columns(categories=[], text=[])).items
    assert set(none["categories"]) == set(none["text"]) == {""}


@pytest.mark.parametrize("form", ["parquet", *FORMS])
def test_a_column_may_play_several_parts(form: str, folder: Path, tmp_path: Path, tables: tuple) -> None:
    if form != "parquet":
        folder = tmp_path / form
        write(form, folder, *tables, genres="token_seq")
    both = read_folder(folder, Columns(categories=["genres", "title"], text=["title", "plot"])).items
    assert both["categories"].tolist()[2:] == ["Three", "Comedy, Four"]
    assert both["text"].tolist()[:2] == ["One first", "Two, Again"]
    assert read_folder(folder, Columns(title="item_id")).items["title"].tolist() == ["1", "2", "3", "4"]
    assert read_folder(folder, Columns(user="item_id")).interactions["user_id"].tolist()[:2] == ["4", "1"]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_lists_of_lists_become_one_list(form: str, folder: Path, tmp_path: Path, tables: tuple) -> None:
    """So Amazon's metadata of 2014 have their categories."""
    genres = [[["Books", "Noir"]], [["Books"], [], ["Film", None]], [], None]
    if form == "parquet":
        rewrite(folder, "items", genres=genres)
    else:
        folder = tmp_path / form
        write(form, folder, tables[0], tables[1].assign(genres=genres))
    assert read_folder(folder, COLUMNS).items["categories"].tolist() == ["Books, Noir", "Books, Film", "", ""]


class TestBadInput:
    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no folder .*nowhere.*data\.root"):
            read_folder(tmp_path / "nowhere", COLUMNS)

    @pytest.mark.parametrize("kind", ["interactions", "items"])
    def test_missing_file(self, kind: str, folder: Path) -> None:
        (folder / f"{kind}.parquet").unlink()
        with pytest.raises(UserError, match=rf"{kind}\.parquet, {kind}\.csv"):
            read_folder(folder, COLUMNS)

    def test_two_files_of_a_kind(self, folder: Path) -> None:
        (folder / "items.csv").write_text("item_id,title\n1,One\n")
        with pytest.raises(UserError, match=r"items\.parquet, items\.csv"):
            read_folder(folder, COLUMNS)

    @pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
    def test_a_file_that_is_something_else(self, suffix: str, folder: Path) -> None:
        (folder / "items.parquet").unlink()
        (folder / f"items.{suffix}").write_text("this is not a table")
        with pytest.raises(UserError, match=rf"items\.{suffix} cannot be read as {suffix}"):
            read_folder(folder, COLUMNS)

    @pytest.mark.parametrize(
        ("kind", "name", "content"),
        [
            ("interactions", "interactions.csv", "user_id,item_id,position\nu,1,0,5\nu,2,1,4\n"),
            ("interactions", "interactions.csv", "user_id;item_id;position\nu;1;0;5\nu;2;1\n"),
            ("interactions", "shop.inter", "user_id:token\titem_id:token\tposition:float\nu\t1\t0\t5\nu\t2\t1\t4\n"),
            ("items", "items.csv", "item_id,title,genres\n1,Two, Again,Noir\n2,Two,Noir\n"),
            ("items", "shop.item", "item_id:token\ttitle:token_seq\tgenres:token\n1\tTwo\tAgain\tNoir\n"),
        ],
    )
    def test_more_fields_than_the_header_has(self, kind: str, name: str, content: str, folder: Path) -> None:
        """pandas would take the first for an index, and every column would hold the next one's cells."""
        (folder / f"{kind}.parquet").unlink()
        (folder / name).write_text(content)
        with pytest.raises(
            UserError, match=rf"{name} has rows of 4 fields, and its header has 3\. Name the extra .* in quotes"
        ):
            read_folder(folder, Columns())

    def test_one_row_further_down_has_more_fields(self, folder: Path) -> None:
        (folder / "items.parquet").unlink()
        (folder / "items.csv").write_text("item_id,title\n1,One\n2,Two, Again\n")
        with pytest.raises(UserError, match=r"items\.csv cannot be read as csv .*Expected 2 fields in line 3, saw 3"):
            read_folder(folder, COLUMNS)

    @pytest.mark.parametrize("name", ["interactions.csv", "shop.inter"])
    def test_a_header_without_rows(self, name: str, folder: Path) -> None:
        (folder / "interactions.parquet").unlink()
        mark = "," if name.endswith("csv") else "\t"
        (folder / name).write_text(mark.join(("user_id", "item_id", "position")) + "\n")
        assert len(read_folder(folder, COLUMNS).interactions) == 0

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ('[{"item_id": 1, "title": "One"}, {"item_id": 2, "title": "Two"}]', "a line holds no object"),
            ('[\n{"item_id": 1, "title": "One"}\n]', ".+"),
            ("1\n2\n", "a line holds no object"),
            ('{"item_id": 1, "title": "One"}\n2\n', "a line holds no object"),
            ('{"item_id": 1, "title": "One"}\nnull\n', "a line holds no object"),
            ("", "it is empty"),
            ("\n\n", "it is empty"),
        ],
    )
    def test_json_lines_that_are_no_objects(self, content: str, reason: str, folder: Path) -> None:
        (folder / "items.parquet").unlink()
        (folder / "items.jsonl").write_text(content)
        with pytest.raises(UserError, match=rf"items\.jsonl cannot be read as jsonl \({reason}\)\. .* one JSON object on each"):
            read_folder(folder, COLUMNS)

    @pytest.mark.parametrize("name", ["interactions.parquet", "items.csv"])
    def test_a_folder_in_place_of_a_file(self, name: str, folder: Path) -> None:
        kind = name.split(".")[0]
        (folder / f"{kind}.parquet").unlink()
        (folder / name).mkdir()
        (folder / name / "part-00000.parquet").touch()
        with pytest.raises(UserError, match=rf"{name} is a folder of files.* Write the {kind} there as one file"):
            read_folder(folder, COLUMNS)

    def test_parquet_that_is_damaged_inside(self, folder: Path) -> None:
        path = folder / "items.parquet"
        content = bytearray(path.read_bytes())
        content[4:40] = b"\xff" * 36  # the first page; names and sizes stand at the end
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"(?s)items\.parquet cannot be read as parquet .*Write it again"):
            read_folder(folder, COLUMNS)

    @pytest.mark.parametrize(
        ("change", "wrong", "near", "key"),
        [
            ({"user": "usr_id"}, "usr_id", "user_id", "user"),
            ({"item": "itemid"}, "itemid", "item_id", "item"),
            ({"time": "timestmp"}, "timestmp", "timestamp", "time"),
            ({"title": "titel"}, "titel", "title", "title"),
            ({"categories": ["genre"]}, "genre", "genres", "categories"),
            ({"text": ["plott"]}, "plott", "plot", "text"),
        ],
    )
    def test_misspelt_column(self, change: dict, wrong: str, near: str, key: str, folder: Path) -> None:
        with pytest.raises(UserError) as error:
            read_folder(folder, Columns(**change))
        assert f"no column '{wrong}'. Did you mean '{near}'?" in str(error.value)
        assert f"data.columns.{key}=NAME" in str(error.value)

    @pytest.mark.parametrize(("kind", "column"), [("interactions", "user_id"), ("items", "title")])
    def test_a_column_that_plays_another_part_is_not_proposed(self, kind: str, column: str, folder: Path) -> None:
        path = folder / f"{kind}.parquet"
        pd.read_parquet(path).rename(columns={column: "xx"}).to_parquet(path)
        with pytest.raises(UserError, match=f"no column '{column}'. It has: .*item_id"):
            read_folder(folder, COLUMNS)

    def test_missing_time_names_both_and_the_nearest(self, folder: Path) -> None:
        path = folder / "interactions.parquet"
        pd.read_parquet(path).rename(columns={"timestamp": "timestanp"}).to_parquet(path)
        with pytest.raises(UserError, match=r"neither a column 'timestamp' nor 'position'\. Did you mean 'timestanp'"):
            read_folder(folder, COLUMNS)

    @pytest.mark.parametrize("other", ["time", "datetime", "Timestamp", "created_at"])
    def test_position_beside_what_may_be_a_time(self, other: str, folder: Path) -> None:
        path = folder / "interactions.parquet"
        table = pd.read_parquet(path).rename(columns={"timestamp": other}).assign(position=0)
        table.to_parquet(path)
        message = rf"no column 'timestamp', and several .*: {other}, position\. Choose one with data\.columns\.time={other}"
        with pytest.raises(UserError, match=message):
            read_folder(folder, COLUMNS)
        for chosen in (other, "position"):
            found = read_folder(folder, replace(COLUMNS, time=chosen))
            assert found.interactions["time"].tolist() == table[chosen].tolist()
            assert f"column '{chosen}'" in found.info["notes"][0]

    def test_split_and_rating_are_needed_only_when_asked_for(self, folder: Path) -> None:
        for flag in ("split", "rating"):
            with pytest.raises(UserError, match=f"no column '{flag}'"):
                read_folder(folder, COLUMNS, **{flag: True})

    def test_duplicate_item_ids(self, folder: Path) -> None:
        rewrite(folder, "items", item_id=["1", "2", "2", "4"])
        with pytest.raises(UserError, match=r"items\.parquet: item id '2' occurs more than once"):
            read_folder(folder, COLUMNS)

    def test_unknown_item(self, folder: Path) -> None:
        rewrite(folder, "interactions", item_id=["4", "1", "2", "1", "99", "2", "4", "99", "88", "4"])
        with pytest.raises(UserError, match=r"item '99' \(row 5\) is not in .*items\.parquet; 2 items in 3 interactions"):
            read_folder(folder, COLUMNS)

    @pytest.mark.parametrize(
        ("times", "message"),
        [
            (
                [1.0, np.nan, 3, 4, 5, 6, 7, 8, 9, 10],
                r"'timestamp' is empty \(NaN\) or not a number in 1 rows, first in row 2 \(nan\)\. Fill",
            ),
            (
                [1.0, 2, np.inf, 4, 5, 6, 7, 8, 9, 10],
                r"'timestamp' is empty \(NaN\) or not a number in 1 rows, first in row 3",
            ),
            (["1", "2", "3", "x", "5", "6", "7", "8", "9", "y"], r"in 2 rows, first in row 4 \('x'\)"),
            (["17.05.2026"] * 10, r"in 10 rows, first in row 1 \('17.05.2026'\)\. .* write dates as 2026-05-17T12:00, or drop"),
            (["2026-05-17", "yesterday"] * 5, r"in 5 rows, first in row 2 \('yesterday'\)"),
            (["2026-05-17"] * 9 + [None], r"in 1 rows, first in row 10"),
            (["2020-01-01"] * 9 + ["0"], r"'timestamp' is empty \(NaN\) or not a date in 1 rows, first in row 10 \('0'\)"),
            (["1"] * 9 + ["2020-01-01"], r"not a number in 1 rows, first in row 10 \('2020-01-01'\)"),
            ([1, 2, 3, 4, -5, 6, 7, -8, 9, 10], r"'timestamp' is negative in 2 rows, first in row 5 \(-5\)"),
        ],
    )
    def test_times(self, times: list, message: str, folder: Path) -> None:
        rewrite(folder, "interactions", timestamp=times)
        with pytest.raises(UserError, match=message):
            read_folder(folder, COLUMNS)

    @pytest.mark.parametrize("empty", [None, "", " \t"])
    @pytest.mark.parametrize(
        ("kind", "column"), [("interactions", "user_id"), ("interactions", "item_id"), ("items", "item_id")]
    )
    def test_empty_ids(self, kind: str, column: str, empty: str | None, folder: Path) -> None:
        ids = pd.read_parquet(folder / f"{kind}.parquet")[column]
        ids = ids.astype(float if column == "item_id" and empty is None else object)
        ids[1] = empty
        rewrite(folder, kind, **{column: ids})
        message = rf"{kind}\.parquet: column '{column}' is empty \(NaN or blank\) in 1 rows, first in row 2"
        with pytest.raises(UserError, match=message):
            read_folder(folder, COLUMNS)

    @pytest.mark.parametrize("form", FORMS)
    def test_blank_ids_in_other_formats(self, form: str, tmp_path: Path, tables: tuple) -> None:
        interactions = tables[0].assign(user_id=["a", "", *"bcdefghi"])
        write(form, tmp_path / form, interactions, tables[1])
        with pytest.raises(UserError, match=r"column 'user_id' is empty \(NaN or blank\) in 1 rows, first in row 2"):
            read_folder(tmp_path / form, Columns())

    @pytest.mark.parametrize(
        ("dtype", "largest", "wrong"),
        [
            (np.float64, 2**53 - 1, 2**53),
            (np.float64, 2**53 - 1, 1e19),
            (np.float64, 2**53 - 1, -np.inf),
            (np.float32, 2**24 - 1, 2**24),
        ],
    )
    def test_ids_too_large_for_their_decimal_point(self, dtype: type, largest: int, wrong: float, folder: Path) -> None:
        def ids(last: float) -> np.ndarray:
            return np.array([*range(9), last], dtype)

        rewrite(folder, "interactions", user_id=ids(largest))
        assert read_folder(folder, COLUMNS).interactions["user_id"].tolist()[8:] == ["8", str(largest)]
        rewrite(folder, "interactions", user_id=ids(wrong))
        with pytest.raises(UserError, match=r"'user_id' holds ids as .* of which 1 are too large .* row 10 .*\. Store ids as"):
            read_folder(folder, COLUMNS)

    def test_large_integers_beside_a_fraction_in_json(self, tmp_path: Path) -> None:
        rows = [{"user_id": 1.5, "item_id": 1, "timestamp": 1}, {"user_id": 2**60 + 1, "item_id": 1, "timestamp": 2}]
        (tmp_path / "interactions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "items.jsonl").write_text('{"item_id": 1, "title": "One"}\n')
        with pytest.raises(UserError, match=r"'user_id' .* too large to be exact, first in row 2"):
            read_folder(tmp_path, COLUMNS)

    def test_local_without_path(self) -> None:
        with pytest.raises(UserError, match=r"data=local needs data\.path=FOLDER"):
            source_of(DataConfig(name="local", source="folder"))


def test_an_id_that_the_items_alone_lack_has_a_cure_that_works(folder: Path) -> None:
    items = pd.read_parquet(folder / "items.parquet").rename(columns={"item_id": "asin"})
    items.to_parquet(folder / "items.parquet", index=False)
    with pytest.raises(UserError, match=r"data.columns.catalogue_item="):
        read_folder(folder, Columns())
    assert len(read_folder(folder, Columns(catalogue_item="asin")).items) == len(items)


def test_fingerprint_follows_the_content_and_not_the_path(folder: Path, tmp_path: Path) -> None:
    first = folder_fingerprint(folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert folder_fingerprint(tmp_path / "elsewhere") == first
    assert str(tmp_path) not in json.dumps(first)
    rewrite(folder, "items", title=["One", "Two", "Three", "Five"])
    second = folder_fingerprint(folder)
    rewrite(folder, "interactions", timestamp=range(10))
    assert len({json.dumps(f) for f in (first, second, folder_fingerprint(folder))}) == 3


@pytest.mark.parametrize("form", ["parquet", *FORMS])
def test_fingerprint_says_where_position_orders_what_happened_at_one_time(
    form: str, folder: Path, tmp_path: Path, tables: tuple
) -> None:
    """Such data were ordered by the file before; all others keep the fingerprint that they had."""

    def found(name: str, time: str | None = None, **columns: object) -> dict:
        interactions = tables[0].assign(**columns)
        if form == "parquet":
            shutil.copytree(folder, tmp_path / name)
            interactions.to_parquet(tmp_path / name / "interactions.parquet")
        else:
            write(form, tmp_path / name, interactions, tables[1])
        settings = DataConfig(name="local", source="folder", path=str(tmp_path / name), columns=Columns(time=time))
        return source_of(settings).fingerprint()

    assert set(found("plain")) == set(found("by position", "position", position=0)) == {"files", "columns"}
    assert found("both", position=0)["ties"] == found("named", "rank", position=0, rank=1)["ties"] == "position"
