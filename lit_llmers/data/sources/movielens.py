"""MovieLens-100K and -1M from the archives of their publisher, GroupLens.

F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4):19, 2015. Research use
only, no redistribution: see the README inside the archive. The archives have titles and genres, no plots.
"""

import hashlib
import io
import os
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lit_llmers.data import Columns, DataConfig
from lit_llmers.data.interactions import Tables, check_tables
from lit_llmers.data.table import Table
from lit_llmers.errors import UserError, unknown
from lit_llmers.files import atomic_write

URL = "https://files.grouplens.org/datasets/movielens"
MD5 = {"ml-100k": "0e33842e24a9c977be4e0107933c0723", "ml-1m": "c4d9eecfca2ab87c1945afe126590906"}
TIMEOUT = 10  # seconds without an answer
COLUMNS = Columns(time="timestamp", categories=["genres"], text=[])


@dataclass(frozen=True)
class MovieLens:
    """`ml-100k` or `ml-1m` from GroupLens, kept in the cache folder."""

    config: DataConfig

    def __post_init__(self) -> None:
        if self.config.name not in MD5:
            raise unknown("MovieLens data set (data.name)", self.config.name, MD5)
        if self.config.split == "given":
            raise UserError(
                f"The archive of {self.config.name} has no column 'split'. Use data.split=leave-one-out or data.split=temporal."
            )

    def fingerprint(self) -> dict[str, Any]:
        return {"archive": f"{self.config.name}.zip", "md5": MD5[self.config.name]}

    def load(self) -> Tables:
        name = self.config.name
        archive = fetch(f"{URL}/{name}.zip", MD5[name], cache_folder() / f"{name}.zip", name)
        ratings, movies = (read_100k if name == "ml-100k" else read_1m)(archive)
        info = {"generated": False, "notes": [f"{name} from GroupLens: {URL}/{name}.zip, research use only."]}
        return check_tables(
            Table.of(ratings, f"{archive} (ratings)"),
            Table.of(movies, f"{archive} (movies)"),
            COLUMNS,
            rating=self.config.min_rating is not None,
            info=info,
        )


def cache_folder() -> Path:
    """Where downloads are kept: $LIT_LLMERS_CACHE, or ~/.cache/lit_llmers.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(os.environ.get("LIT_LLMERS_CACHE", "~/.cache/lit_llmers")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    raise UserError(f"The cache folder {folder} cannot be written. Set LIT_LLMERS_CACHE to a folder that can.")


def fetch(url: str, md5: str, path: Path, name: str) -> Path:
    """Download `url` to `path` unless it is there; the content has the checksum `md5` or nothing stays.

    Raises:
        UserError: no network, the server refuses, or the checksum is another one.
    """
    cure = f"Name a folder that has {name} with data.root=FOLDER, or put {url} at {path} yourself."
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response, atomic_write(path) as part:
                with open(part, "wb") as file:
                    while block := response.read(1 << 20):
                        file.write(block)
                check_md5(part, md5, f"The download of {url} is damaged or has changed", cure)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise UserError(f"{url} cannot be reached ({error}). {cure}") from error
    check_md5(path, md5, f"{path} is not {url}", f"Remove it. {cure}")
    return path


def check_md5(path: Path, md5: str, what: str, cure: str) -> None:
    """Raise a UserError unless the file has this MD5, the checksum that GroupLens publishes."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        raise UserError(f"{what} (MD5 {found} instead of {md5}). {cure}")


def read_100k(archive: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Parse u.data into `user_id`, `item_id`, `rating`, `timestamp`, and u.item into `item_id`, `title`, `genres`."""
    ratings = _table(archive, "ml-100k/u.data", "\t", ["user_id", "item_id", "rating", "timestamp"])
    genres = _table(archive, "ml-100k/u.genre", "|", ["genre", "number"])["genre"].dropna().tolist()
    movies = _table(archive, "ml-100k/u.item", "|", ["item_id", "title", "released", "video", "url", *genres])
    flags = movies[genres].to_numpy() == "1"  # [n, 19]
    movies["genres"] = ["|".join(genre for genre, is_one in zip(genres, row, strict=True) if is_one) for row in flags]
    return ratings, _without_year(movies[["item_id", "title", "genres"]])


def read_1m(archive: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Parse ratings.dat and movies.dat, with the same columns as `read_100k`."""
    ratings = _table(archive, "ml-1m/ratings.dat", "::", ["user_id", "item_id", "rating", "timestamp"])
    return ratings, _without_year(_table(archive, "ml-1m/movies.dat", "::", ["item_id", "title", "genres"]))


def _table(archive: Path, member: str, separator: str, names: list[str]) -> pd.DataFrame:
    try:
        with zipfile.ZipFile(archive) as content:
            text = content.read(member).decode("latin-1")
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{archive} has no readable {member} ({error}). Remove the archive and run again.") from error
    if separator == "::":  # one character lets pandas use its fast parser
        text, separator = text.replace("::", "\t"), "\t"
    return pd.read_csv(
        io.StringIO(text),
        sep=separator,
        names=names,
        dtype=str,
        quoting=3,
        keep_default_na=False,
        na_values=[""],
        index_col=False,
    )


def _without_year(movies: pd.DataFrame) -> pd.DataFrame:
    return movies.assign(title=movies["title"].str.replace(r"\s*\(\d{4}\)\s*$", "", regex=True))
