"""Interactions and items: what their columns are, and checks of what they say."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lit_llmers.data import Columns
from lit_llmers.data.table import Table, find_table, open_table
from lit_llmers.errors import UserError, nearest
from lit_llmers.files import sha256

TIMESTAMP, POSITION = TIME_NAMES = ("timestamp", "position")
MAYBE_TIMES = ("timestamp", "time", "date", "datetime", "ts", "created_at", "event_time", "unix_time", "unixreviewtime")
CATEGORY_NAMES = ("categories", "category_path", "genres", "category", "genre")
TEXT_NAMES = ("text", "description", "plot", "summary")
_LISTS = (list, tuple, np.ndarray)


@dataclass(frozen=True)
class Tables:
    """What a source loads: checked, with the same columns from every source.

    Attributes:
        interactions: `user_id`, `item_id` (str), `time` (number), where asked for `rating`, `split` (str), and where it is
            there besides a time `position` (number), which orders what a user did at one time; in the order of the file.
        items: `item_id`, `title`, `categories`, `text` and the item texts asked for (all str, never missing); one row per item.
        info: `generated` (bool) and `notes` (list of str), to be kept with the data.
        origin: the file or place that messages name.
        users: `user_id` and the user texts asked for (all str), or None without any.
        order: the column of the file that is `time`.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    info: dict[str, Any] = field(default_factory=lambda: {"generated": False, "notes": []})
    origin: str = "the data"
    users: pd.DataFrame | None = None
    order: str = TIMESTAMP


def read_folder(folder: Path, columns: Columns, split: bool = False, rating: bool = False) -> Tables:
    """Read and check the interactions and items in `folder`; `split` and `rating` say whether these columns matter."""
    paths = [find_table(Path(folder), kind) for kind in ("interactions", "items")]
    return check_tables(open_table(paths[0]), open_table(paths[1]), columns, split, rating)


def folder_fingerprint(folder: Path) -> dict[str, Any]:
    """Name the content of the two tables: their SHA-256, whatever the folder is called."""
    paths = {kind: find_table(Path(folder), kind) for kind in ("interactions", "items")}
    return {kind: {"format": path.suffix, "sha256": sha256(path)} for kind, path in paths.items()}


def check_tables(
    interactions: Table,
    items: Table,
    columns: Columns,
    split: bool = False,
    rating: bool = False,
    info: dict[str, Any] | None = None,
) -> Tables:
    """Bring two tables into the form of `Tables`.

    Raises:
        UserError: a column is missing; several may be the time; an id, a time or a split is missing; a time is neither a date
            nor a number from 0; an item id occurs twice among the items; an interaction has an item that is not among them.
    """
    wanted = {
        "user_id": interactions.require(columns.user, "user"),
        "item_id": interactions.require(columns.item, "item"),
    }
    wanted["time"] = _time_column(interactions, columns.time)
    if split:
        wanted["split"] = interactions.require(columns.split, "split")
    if rating:
        wanted["rating"] = interactions.require(columns.rating, "rating")
    if has_ties(interactions.names, columns.time):
        wanted[POSITION] = POSITION
    raw = interactions.read(list(wanted.values()))
    result = pd.DataFrame({name: raw[column] for name, column in wanted.items()}).reset_index(drop=True)
    for name in ("user_id", "item_id"):
        result[name] = as_ids(result[name], wanted[name], interactions.origin)
    if split:
        _refuse_empty(result["split"].isna() | (result["split"] == ""), wanted["split"], interactions.origin)
    dates = _seconds(result["time"])
    result["time"] = _numbers(
        result["time"],
        wanted["time"],
        interactions.origin,
        "Fill them in, write dates as 2026-05-17T12:00,",
        dates,
    )
    if dates is None and (negative := np.flatnonzero(result["time"] < 0)).size:
        row = negative[0]
        raise UserError(
            f"{interactions.origin}: column '{wanted['time']}' is negative in {negative.size} rows, first in row "
            f"{row + 1} ({result['time'][row]}). Give times as seconds or as positions from 0."
        )
    if rating:
        result["rating"] = _numbers(result["rating"], wanted["rating"], interactions.origin)
    order = f"Order within a user: column '{wanted['time']}'"
    if POSITION in wanted:
        position = pd.to_numeric(result.pop(POSITION), errors="coerce")
        if np.isfinite(position.to_numpy(dtype=float, na_value=np.nan)).all():  # else it is no order
            result[POSITION] = position
            order += f", at the same time column '{POSITION}'"
    catalogue = _catalogue(items, columns)
    met = np.asarray(result["item_id"].unique(), dtype=object)
    strangers = met[pd.Index(catalogue["item_id"].to_numpy(dtype=object)).get_indexer(met) < 0]
    if strangers.size:
        rows = np.flatnonzero(result["item_id"].isin(strangers))
        raise UserError(
            f"{interactions.origin}: item '{strangers[0]}' (row {rows[0] + 1}) is not in {items.origin}; "
            f"{strangers.size} items in {rows.size} interactions are unknown. Add them there or drop the rows."
        )
    info = info or {"generated": False, "notes": []}
    info = {**info, "notes": [*info["notes"], f"{order}."]}
    return Tables(result, catalogue, info, interactions.origin, order=wanted["time"])


def has_ties(names: Collection[str], time: str | None) -> bool:
    """Whether, of columns of these names, `position` orders what a user did at one `time` (as in `Columns`)."""
    return POSITION in names and (time or TIMESTAMP) in names and time != POSITION


def _time_column(table: Table, chosen: str | None) -> str:
    if chosen is not None:
        return table.require(chosen, "time")
    if TIMESTAMP in table.names:
        return TIMESTAMP
    if POSITION in table.names:
        others = [name for name in table.names if name.lower() in MAYBE_TIMES]
        if others:
            raise UserError(
                f"{table.origin} has no column '{TIMESTAMP}', and several that may say the order within a user: "
                f"{', '.join(others)}, {POSITION}. Choose one with data.columns.time={others[0]}."
            )
        return POSITION
    guesses = [guess for name in TIME_NAMES if (guess := nearest(name, table.names))]
    raise UserError(
        f"{table.origin} has neither a column 'timestamp' nor 'position'.{(guesses or [''])[0]} It has: "
        f"{', '.join(table.names)}. Choose the column with data.columns.time=NAME."
    )


def _catalogue(table: Table, columns: Columns) -> pd.DataFrame:
    item = table.require(columns.catalogue_item or columns.item, "catalogue_item")
    title = table.require(columns.title, "title")
    categories = _chosen(table, columns.categories, "categories", CATEGORY_NAMES)
    text = _chosen(table, columns.text, "text", TEXT_NAMES)
    raw = table.read([item, title, *categories, *text]).reset_index(drop=True)
    ids = as_ids(raw[item], item, table.origin)
    twice = ids[ids.duplicated()]
    if len(twice):
        raise UserError(
            f"{table.origin}: item id '{twice.iloc[0]}' occurs more than once in column '{item}' ({len(twice)} rows "
            "too many). Keep one row per item."
        )
    commas = [as_strings(raw[name], ", ", "|" if name not in table.words else " ") for name in categories]
    return pd.DataFrame(
        {
            "item_id": ids,
            "title": as_strings(raw[title], " "),
            "categories": _join(commas, ", ", len(ids)),
            "text": _join([as_strings(raw[name], ", ") for name in text], " ", len(ids)),
        }
    )


def _chosen(table: Table, chosen: list[str] | None, key: str, usual: Sequence[str]) -> list[str]:
    if chosen is None:
        return [name for name in usual if name in table.names][:1]
    return [table.require(name, key) for name in chosen]


def as_ids(column: pd.Series, name: str, origin: str) -> pd.Series:
    """Ids as strings, whole numbers without a decimal point.

    Raises:
        UserError: one is missing or blank, or is a number with a decimal point so large that it may stand for several.
    """
    _refuse_empty(column.isna(), name, origin)
    if pd.api.types.is_float_dtype(column):
        numbers = column.to_numpy()
        inexact = np.flatnonzero(np.abs(numbers) >= 2.0 ** (np.finfo(numbers.dtype).nmant + 1))
        if inexact.size:
            raise UserError(
                f"{origin}: column '{name}' holds ids as numbers with a decimal point ({numbers.dtype}), of which "
                f"{inexact.size} are too large to be exact, first in row {inexact[0] + 1} ({numbers[inexact[0]]:.15g}). "
                "Store ids as text or as integers."
            )
        if (column == column.round()).all():
            column = column.astype(np.int64)
    ids = column.astype(str)
    _refuse_empty(ids.isin([each for each in ids.unique() if not each.strip()]), name, origin)
    return ids


def _refuse_empty(empty: pd.Series, name: str, origin: str) -> None:
    rows = np.flatnonzero(empty)
    if rows.size:
        raise UserError(
            f"{origin}: column '{name}' is empty (NaN or blank) in {rows.size} rows, first in row {rows[0] + 1}. Fill them in "
            "or drop the rows."
        )


def _seconds(column: pd.Series) -> pd.Series | None:
    """Dates (ISO 8601, in UTC where no zone is named) as seconds since 1970, others missing; None for what is no date.

    A column holds dates where more of its cells are dates than numbers: `20200101` counts as a number.
    """
    if not pd.api.types.is_datetime64_any_dtype(column):
        numbers = pd.to_numeric(column, errors="coerce").notna()
        if numbers.all():
            return None
        dates = pd.to_datetime(column.where(~numbers), format="ISO8601", errors="coerce", utc=True)
        if dates.notna().sum() <= numbers.sum():
            return None
    else:
        dates = pd.to_datetime(column, utc=True)
    times = dates.dt.tz_localize(None).to_numpy()  # in their own unit: nanoseconds would end in the year 2262
    return pd.Series((times - np.datetime64(0, "s")) / np.timedelta64(1, "s"), column.index)


def _numbers(
    column: pd.Series, name: str, origin: str, cure: str = "Fill them in", dates: pd.Series | None = None
) -> pd.Series:
    """The cells as numbers, or the seconds of the `dates` that they are."""
    numbers = pd.to_numeric(column, errors="coerce") if dates is None else dates
    wrong = np.flatnonzero(~np.isfinite(numbers.to_numpy(dtype=float, na_value=np.nan)))
    if wrong.size:
        raise UserError(
            f"{origin}: column '{name}' is empty (NaN) or not a {'number' if dates is None else 'date'} in {wrong.size} rows, "
            f"first in row {wrong[0] + 1} ({column.iloc[wrong[:1]].tolist()[0]!r}). {cure} or drop the rows."
        )
    return numbers


def as_strings(column: pd.Series, separator: str, split: str | None = None) -> list[str]:
    """Make every cell a string: lists, nested or not, are joined, missing ones are empty, `split` becomes the separator."""

    def parts(cell: Any) -> Iterator[str]:
        for part in cell:
            if isinstance(part, _LISTS):
                yield from parts(part)
            elif part is not None:
                yield str(part)

    def one(cell: Any) -> str:
        if isinstance(cell, _LISTS):
            return separator.join(parts(cell))
        if cell is None or cell is pd.NA or cell != cell:
            return ""
        return separator.join(str(cell).split(split)) if split else str(cell)

    return [one(cell) for cell in column]


def _join(columns: list[list[str]], separator: str, rows: int) -> list[str]:
    return [separator.join(cell for cell in cells if cell) for cells in zip(*columns, strict=True)] if columns else [""] * rows
