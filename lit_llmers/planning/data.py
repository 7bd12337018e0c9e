"""The data set that a run will train on: the prepared one, the folder's, or one of the same size to stand for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lit_llmers.data import DataConfig
from lit_llmers.data import splits as s
from lit_llmers.data.dataset import CATALOGUE_COLUMNS, Dataset
from lit_llmers.errors import UserError
from lit_llmers.stages import Stage

LARGEST = 200 * 2**20  # bytes of a folder that is read for a plan; more takes longer than a plan may
GENERATED = 5000  # users that are generated for a plan
PUBLISHED = {"ml-100k": (943, 1682, 100_000), "ml-1m": (6040, 3706, 1_000_209)}  # users, items, interactions: GroupLens


@dataclass(frozen=True)
class Known:
    """A data set, real or a stand-in.

    Attributes:
        dataset: with everybody's number of interactions; of a stand-in the items are drawn at random and say nothing.
        origin: where its sizes come from, for the reader.
        exact: whether it is the data set itself.
    """

    dataset: Dataset
    origin: str
    exact: bool


def known_data(prepare: Stage, sizes: tuple[int, int, int] | None) -> Known | None:
    """What is known of the data before, or after, they are prepared; None without anything.

    Args:
        sizes: users, items and interactions that the user states; they count even where other data are prepared.
    """
    if sizes is not None:
        return Known(stand_in(*sizes), "sizes=", False)
    if prepare.done:
        return Known(Dataset.load(prepare.folder), "prepared", True)
    config: DataConfig = prepare.config
    if _readable(config):
        from lit_llmers.data.sources import source_of
        from lit_llmers.prepare import build

        origin = "generated" if config.source == "demo" else "read from its folder"
        return Known(build(source_of(config).load(), config), origin, True)
    if config.source == "demo":
        made = config.generator
        return Known(stand_in(made.users, made.items, round(made.users * made.mean_length)), "the generator's sizes", False)
    if config.name in PUBLISHED and _unfiltered(config):
        return Known(stand_in(*PUBLISHED[config.name]), "near the published sizes", False)
    return None


def _unfiltered(config: DataConfig) -> bool:
    return config.split == "leave-one-out" and not config.k_core and config.min_rating is None


def _readable(config: DataConfig) -> bool:
    """Whether the data set is at hand and small enough to be read, or made, for a plan."""
    if config.source == "demo":
        return config.generator.users <= GENERATED
    place = config.path if config.source == "folder" else config.root and str(Path(config.root) / config.name)
    if not place:
        return False
    files = [path for path in Path(place).expanduser().glob("*") if path.is_file()]
    return bool(files) and sum(path.stat().st_size for path in files) <= LARGEST


def stand_in(users: int, items: int, interactions: int) -> Dataset:
    """A data set of that size: numbers of interactions fall off exponentially above three, as those of shops do, about.

    Raises:
        UserError: it is too small to be split.
    """
    if users < 1 or items < 2 or interactions < 3 * users:
        raise UserError(
            f"sizes=[{users},{items},{interactions}] is no data set: it needs a user, two items, and three interactions for "
            "each user."
        )
    share = -np.log1p(-(np.arange(users) + 0.5) / users)  # quantiles of the exponential distribution
    count = 3 + np.floor(share * ((interactions / users - 3) / share.mean())).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(count)])
    met = np.random.default_rng(0).integers(1, items + 1, offsets[-1], dtype=np.int32)
    catalogue = pd.DataFrame("", index=range(items), columns=list(CATALOGUE_COLUMNS))
    names = np.full(users, "", dtype=object)
    info: dict[str, Any] = {"name": "stand-in"}
    return Dataset(met, offsets, s.leave_one_out(offsets), names, catalogue, info)


def parse_sizes(text: str) -> tuple[int, int, int]:
    """`[users,items,interactions]` of the command line.

    Raises:
        UserError: it is something else.
    """
    parts = text.strip("[]").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise UserError(f"sizes={text} must be three numbers: sizes=[USERS,ITEMS,INTERACTIONS].")
    users, items, interactions = (int(part) for part in parts)
    return users, items, interactions
