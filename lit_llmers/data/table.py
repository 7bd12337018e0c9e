"""A file's columns, whatever its format.

A folder holds `interactions.*` and `items.*` as parquet, CSV (of commas, or else of semicolons or tabs) or JSON lines, or one
RecBole atomic file of each kind (`NAME.inter`, `NAME.item`: tab separated, `name:type` headers). User features (`users.*`) are
not read: no method here uses them.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet

from lit_llmers.data import Columns
from lit_llmers.errors import UserError, nearest

SUFFIXES = {"interactions": ".inter", "items": ".item"}


@dataclass(frozen=True)
class Table:
    """One file's columns; of parquet those asked for are read, of the other formats the whole file at once.

    Attributes:
        origin: the file or place that messages name.
        names: of all columns.
        load: from different names to their columns.
        words: names of columns that hold blank-separated words (RecBole).
    """

    origin: str
    names: list[str]
    load: Callable[[list[str]], pd.DataFrame]
    words: frozenset[str] = frozenset()

    @classmethod
    def of(cls, frame: pd.DataFrame, origin: str, words: frozenset[str] = frozenset()) -> "Table":
        return cls(origin, list(frame.columns), lambda names: frame[names], words)

    def read(self, names: list[str]) -> pd.DataFrame:
        """The columns of these names, each once: one column may play several parts."""
        return self.load(list(dict.fromkeys(names)))

    def require(self, name: str, key: str) -> str:
        """Return `name` if there is such a column.

        Raises:
            UserError: there is none; the message names the nearest one and the setting `key` that chooses.
        """
        if name not in self.names:
            near = nearest(name, set(self.names) - {usual for part, usual in asdict(Columns()).items() if part != key})
            raise UserError(
                f"{self.origin} has no column '{name}'.{near} It has: {', '.join(self.names)}. "
                f"Choose the column with data.columns.{key}=NAME."
            )
        return name


def find_table(folder: Path, kind: str) -> Path:
    """Find the one file of `kind` (interactions or items) in `folder`.

    Raises:
        UserError: there is no such folder or file, more than one file, or a folder in its place.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Set data.root or data.path to where the data lie.")
    names = [f"{kind}.{suffix}" for suffix in ("parquet", "csv", "jsonl")]
    found = [folder / name for name in names if (folder / name).is_file()] + sorted(folder.glob(f"*{SUFFIXES[kind]}"))
    if not found and (folders := [folder / name for name in names if (folder / name).is_dir()]):
        raise UserError(f"{folders[0]} is a folder of files, as Spark writes it. Write the {kind} there as one file.")
    if not found:
        raise UserError(
            f"There is no {', '.join(names)} or *{SUFFIXES[kind]} in {folder}. Put the {kind} there under one of these names."
        )
    if len(found) > 1:
        raise UserError(f"{folder} has more than one file of {kind}: {', '.join(p.name for p in found)}. Keep one of them.")
    return found[0]


def open_table(path: Path) -> Table:
    """Open a parquet, CSV, JSON lines or RecBole atomic file.

    Raises:
        UserError: the file cannot be read in the format of its suffix. What is damaged in a parquet file may show only when
            columns are read.
    """
    with _readable(path):
        if path.suffix == ".parquet":
            load = _readable(path)(partial(read_parquet, path))
            return Table(str(path), pyarrow.parquet.read_schema(path).names, load)
        if path.suffix == ".jsonl":
            return Table.of(_read_objects(path), str(path))
        if path.suffix == ".csv":
            return Table.of(_read_rows(path, sep=_separator(path)), str(path))
        frame = _read_rows(path, sep="\t", quoting=3)
        kinds = {name: kind for name, _, kind in (column.partition(":") for column in frame.columns)}
        frame.columns = pd.Index(list(kinds))
        words = frozenset(name for name, kind in kinds.items() if kind == "token_seq")
        return Table.of(frame, str(path), words)


def column_names(path: Path) -> list[str]:
    """Names of the columns, without reading the rows; of JSON lines those of the first.

    Raises:
        UserError: the file cannot be read in the format of its suffix.
    """
    with _readable(path):
        if path.suffix == ".parquet":
            return list(pyarrow.parquet.read_schema(path).names)
        with open(path, encoding="utf-8", errors="replace") as file:
            first = next((line for line in file if line.strip()), "")
        if path.suffix == ".jsonl":
            row = json.loads(first or "{}")
            return list(row) if isinstance(row, dict) else []
        if path.suffix == ".csv":
            return list(pd.read_csv(path, sep=_separator(path), nrows=0).columns)
        return [column.partition(":")[0] for column in first.rstrip("\n").split("\t")]


def read_parquet(path: Path, names: list[str]) -> pd.DataFrame:
    """Columns of a parquet file. Bytes are text; a column that pandas wrote as its index is one like others."""
    table = pyarrow.parquet.read_table(path, columns=names)
    fields = [each.with_type(pyarrow.string()) if pyarrow.types.is_binary(each.type) else each for each in table.schema]
    return table.cast(pyarrow.schema(fields)).to_pandas(ignore_metadata=True)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        form = "with one JSON object on each line, not an array" if path.suffix == ".jsonl" else "in that format"
        raise UserError(f"{path} cannot be read as {path.suffix[1:]} ({error}). Write it again {form}.") from error


def _read_objects(path: Path) -> pd.DataFrame:
    """JSON lines, each of which holds an object: its keys are the columns."""
    try:
        frame = pd.read_json(path, lines=True, dtype=False, convert_dates=False)
    except TypeError as error:  # of objects and others
        raise ValueError("a line holds no object") from error
    if frame.columns.empty:
        raise ValueError("it is empty")
    if not all(isinstance(name, str) for name in frame.columns):  # of values and arrays, whose places pandas counts
        raise ValueError("a line holds no object")
    return frame


def _separator(path: Path) -> str:
    """Of a CSV file: commas, or where the header has none the semicolons or tabs that it has."""
    with open(path, encoding="utf-8", errors="replace") as file:
        header = file.readline()
    return "," if "," in header else next((mark for mark in ";\t" if mark in header), ",")


def _read_rows(path: Path, **form: Any) -> pd.DataFrame:
    """All cells as strings, empty ones as missing.

    Raises:
        UserError: the first row has more fields than the header, of which pandas would make an index and shift the others. One
            further down is an error of pandas.
    """
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""], **form)
    if not isinstance(frame.index, pd.RangeIndex):
        names = len(frame.columns)
        raise UserError(
            f"{path} has rows of {names + frame.index.nlevels} fields, and its header has {names}. Name the extra column in "
            "the header, or put cells that hold the separator in quotes."
        )
    return frame
