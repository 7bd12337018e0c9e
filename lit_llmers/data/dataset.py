"""What the `prepare` stage leaves behind: every user's items in order, the part each belongs to, and the catalogue."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lit_llmers.errors import UserError
from lit_llmers.files import atomic_write, read_json, readable, write_json

TRAIN, VALID, TEST = 0, 1, 2
CATALOGUE_COLUMNS = ("item_id", "title", "categories", "text")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Interactions of U users with n items, users one after the other, chronological within a user.

    Attributes:
        items: `[N]` int32, item index 1..n (0 is padding and never occurs).
        offsets: `[U+1]` int64; user u owns `items[offsets[u]:offsets[u+1]]`.
        split: `[N]` uint8, TRAIN, VALID or TEST; never decreases within a user.
        users: `[U]` original user ids (str).
        catalogue: n rows, row i-1 is item i: `item_id`, `title`, `categories` (comma separated), `text`, and the item texts
            of `data.texts`; all str.
        info: JSON-able: `name`, `generated`, `split`, `k_core`, `min_interactions`, `counts`, `dropped`, `notes`, and where
            asked for `texts`: for each, whether it is of items or users and whether it leaks.
        user_texts: U rows, the user texts of `data.texts` (str); None without any.
    """

    items: np.ndarray
    offsets: np.ndarray
    split: np.ndarray
    users: np.ndarray
    catalogue: pd.DataFrame
    info: dict[str, Any]
    user_texts: pd.DataFrame | None = None

    @property
    def n_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_items(self) -> int:
        """Number of items without the padding; valid indices are 1..n_items."""
        return len(self.catalogue)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that name order, split and ids; titles and texts do not enter."""
        sha = hashlib.sha256()
        for array, dtype in ((self.items, "<i4"), (self.offsets, "<i8"), (self.split, "u1")):
            sha.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
        for ids in (self.catalogue["item_id"].to_numpy(dtype=object), self.users):
            sha.update("\x00".join(ids).encode() + b"\x01")
        return sha.hexdigest()[:12]

    @property
    def training_pairs(self) -> np.ndarray:
        """`[E, 2]` int64: user 0..U-1 and item 1..n of every training interaction, users in order."""
        train = np.flatnonzero(self.split == TRAIN)
        user = np.repeat(np.arange(self.n_users), np.diff(self.offsets))[train]
        return np.stack([user, self.items[train]], 1)

    def popularity(self) -> np.ndarray:
        """Count the training interactions per item: `[n_items+1]` int64, index 0 (padding) is 0."""
        return np.bincount(self.items[self.split == TRAIN], minlength=self.n_items + 1)

    def save(self, folder: Path) -> None:
        """Write the data set to `folder`; `dataset.json` comes last, so its presence means that all is there."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except PermissionError as error:
            raise UserError(f"No permission to make {folder}. Choose another folder with run.dir=FOLDER.") from error
        (folder / "dataset.json").unlink(missing_ok=True)
        for name, dtype in (("items", np.int32), ("offsets", np.int64), ("split", np.uint8)):
            with atomic_write(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, np.asarray(getattr(self, name), dtype=dtype), allow_pickle=False)
        with atomic_write(folder / "catalogue.parquet") as temporary:
            self.catalogue.to_parquet(temporary, index=False)
        with atomic_write(folder / "users.parquet") as temporary:
            pd.DataFrame({"user_id": self.users}).to_parquet(temporary, index=False)
        if self.user_texts is not None:
            with atomic_write(folder / "user_texts.parquet") as temporary:
                self.user_texts.to_parquet(temporary, index=False)
        write_json(folder / "dataset.json", {"fingerprint": self.fingerprint, "info": self.info})

    @classmethod
    def load(cls, folder: Path) -> "Dataset":
        """Open a saved data set; the arrays stay memory-mapped and read-only.

        Raises:
            UserError: a file is missing or damaged, or the files are not the ones that `dataset.json` names.
        """
        folder = Path(folder)
        record = read_json(folder / "dataset.json")
        with readable(folder, folder):
            items, offsets, split = (
                np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("items", "offsets", "split")
            )
            catalogue = pd.read_parquet(folder / "catalogue.parquet")
            users = pd.read_parquet(folder / "users.parquet")["user_id"].to_numpy(dtype=object)
            written = folder / "user_texts.parquet"
            user_texts = pd.read_parquet(written) if written.exists() else None
        dataset = cls(items, offsets, split, users, catalogue, record["info"], user_texts)
        if dataset.fingerprint != record["fingerprint"]:
            raise UserError(
                f"The files in {folder} are not the ones that its dataset.json names. Remove the folder and give the same "
                "command again."
            )
        return dataset


def distinct(keys: np.ndarray) -> np.ndarray:
    """Different values of `[N]`, ascending: `np.unique`, which takes twenty to a hundred times as long."""
    keys = np.sort(keys)
    return keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys
