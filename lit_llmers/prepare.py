"""The first stage: load a data set, filter it, split it, and write it as arrays."""

if __name__ == "__main__":
    from lit_llmers.stages import no_command

    no_command("prepare")  # before anything that takes time is imported


import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lit_llmers.data import DataConfig
from lit_llmers.data import splits as s
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.dropped import UNMET, dropped_lines
from lit_llmers.data.interactions import POSITION, Tables
from lit_llmers.data.sources import source_of
from lit_llmers.errors import UserError
from lit_llmers.stages import Stage

log = logging.getLogger(__name__)


def run(stage: Stage) -> dict[str, Any]:
    """The `prepare` stage: save the data set that its settings describe in its folder."""
    return prepare(stage.config, stage.folder)


def prepare(config: DataConfig, folder: Path) -> dict[str, Any]:
    """Make the data set that `config` describes and save it in `folder`; return its `info`.

    Raises:
        UserError: the source cannot be read, its content is wrong, or nothing is left after filtering.
    """
    dataset = build(source_of(config).load(), config)
    dataset.save(folder)
    for line in [*dropped_lines(dataset.info["dropped"]), *dataset.info["notes"]]:
        log.info(line)
    return dataset.info


def build(tables: Tables, config: DataConfig) -> Dataset:
    """Filter, order and split the tables.

    The filters, one after the other: `min_rating`, `min_interactions`, `k_core` (which keeps users at
    `min_interactions` or more). Items without interactions leave the catalogue.
    """
    rows = _Rows(tables, config.name)
    if config.split == "temporal":  # before a filter can take a user's first interactions
        if tables.order == POSITION and config.columns.time is None:
            raise UserError(
                f"{tables.origin}: the column '{POSITION}' was taken for the order within a user, and data.split=temporal "
                "needs moments that all users share. Choose their column with data.columns.time=NAME, or use "
                "data.split=leave-one-out."
            )
        s.check_moments(rows.users, rows.table["time"].to_numpy(), tables.origin)
    if config.min_rating is not None:
        rows.keep(rows.table["rating"].to_numpy() >= config.min_rating, f"min_rating={config.min_rating:g}")
    rows.keep(s.enough(rows.users, config.min_interactions), f"min_interactions={config.min_interactions}")
    if config.k_core > 1:
        core = s.k_core(rows.users, rows.items, max(config.k_core, config.min_interactions), config.k_core)
        rows.keep(core, f"k_core={config.k_core}")
    labelled = np.zeros(3, np.int64)  # interactions of each part, before users and items that nothing is known of go
    if config.split == "given":
        split = s.given(rows.table["split"].to_numpy(), tables.origin)
        split = split[rows.sort(split)]
        s.check_order(split, rows.users, rows.user_ids, tables.origin)
        labelled = np.bincount(split, minlength=3)
        split = rows.keep_known(split, config.split, "users")
    else:
        rows.sort()
    if config.split == "temporal":
        split, moments = s.temporal(rows.table["time"].to_numpy(), config.quantiles)
        rows.note(f"Training before time {moments[0]:.15g}, validation before {moments[1]:.15g}, test from there on.")
        split = rows.keep_known(split, config.split, "users", "items")
    users, user_ids = rows.present(rows.users, rows.user_ids)
    items, item_ids = rows.present(rows.items, rows.item_ids)
    catalogue = tables.items.set_index("item_id").loc[item_ids].reset_index()
    offsets = s.offsets_of(users)
    if config.split == "leave-one-out":
        split = s.leave_one_out(offsets)
    user_texts = None if tables.users is None else tables.users.set_index("user_id").loc[user_ids].reset_index(drop=True)
    about = tables.info.get("texts", {})
    for name, entry in about.items():
        column = (catalogue if user_texts is None or name in catalogue else user_texts)[name]
        leaks = " They may have been written with held-out items in view." if entry["leaks"] else ""
        rows.note(f"{name}: texts of {int((column != '').sum())} of {len(column)} {entry['of']}.{leaks}")
    parts = np.bincount(split, minlength=3).tolist()
    _check(parts, labelled.tolist(), len(item_ids), config)
    if config.split == "leave-one-out" and (undecided := s.undecided(offsets, *rows.times)).any():
        rows.note(
            f"{undecided.sum()} of {len(user_ids)} users have their test or validation item at the same time as the item "
            "before it: the order of the file decides which is held out."
        )
    met = users.astype(np.int64) * len(item_ids) + items
    ordered = np.sort(met)
    repeats = np.count_nonzero(ordered[1:] == ordered[:-1])
    if repeats:
        order = met.argsort(kind="stable")  # one user's with one item stay in the order of their times
        met, time = met[order], rows.table["time"].to_numpy()[order]
        twice = np.count_nonzero((met[1:] == met[:-1]) & (time[1:] == time[:-1]))
        alike = f", {twice} of them at the same time" if twice else ""
        rows.note(f"{repeats} interactions repeat an item that the user had before{alike}; they are kept.")
    if untitled := int((catalogue["title"].str.strip() == "").sum()):
        rows.note(f"{untitled} of {len(catalogue)} items have no title.")
    counts = {"users": len(user_ids), "items": len(item_ids), "interactions": len(users)}
    dropped = rows.dropped | {UNMET: len(tables.items) - len(item_ids)}
    info = {
        "name": config.name,
        "generated": bool(tables.info["generated"]),
        "split": config.split,
        "k_core": config.k_core,
        "min_interactions": config.min_interactions,
        "min_rating": config.min_rating,
        "counts": counts | dict(zip(("train", "valid", "test"), parts, strict=True)),
        "dropped": dropped,
        "notes": [*tables.info["notes"], *rows.notes],
        **({"texts": about} if about else {}),
    }
    return Dataset((items + 1).astype(np.int32), offsets, split, user_ids, catalogue, info, user_texts)


def _check(parts: list[int], labelled: list[int], n_items: int, config: DataConfig) -> None:
    """Refuse what could be trained on but not evaluated.

    Args:
        parts, labelled: interactions that train, validate and test, as they are and as the column of a given split has them.
    """
    if n_items < 2:
        raise UserError(f"'{config.name}' has one item: there is nothing to rank. Relax the filters or take more data.")
    named = (("validation", "select an epoch on"), ("test", "evaluate on"))
    for (part, purpose), rows, before in zip(named, parts[1:], labelled[1:], strict=True):
        if not rows:
            why, cure = "", f"Correct the column '{config.columns.split}'"
            if config.split == "temporal":
                cure = "Move data.quantiles"
            elif before:
                why = f" All {before} interactions there are of users without a training interaction, who are dropped."
                cure = "Let the earlier interactions of these users train"
            raise UserError(
                f"The {part} part of '{config.name}' is empty with data.split={config.split}: nothing to {purpose}.{why} "
                f"{cure}, or use data.split=leave-one-out."
            )


class _Rows:
    """The interactions still there, with users coded by first appearance and items by place in the catalogue."""

    def __init__(self, tables: Tables, name: str) -> None:
        self.name = name
        self.table = tables.interactions.drop(columns=["user_id", "item_id"])  # codes take their place
        self.users, user_ids = pd.factorize(tables.interactions["user_id"])
        self.user_ids = np.asarray(user_ids, dtype=object)
        self.item_ids = tables.items["item_id"].to_numpy(dtype=object)
        items, met = pd.factorize(tables.interactions["item_id"])
        self.items = pd.Index(self.item_ids).get_indexer(np.asarray(met, dtype=object))[items]
        self.dropped: dict[str, dict[str, int]] = {}
        self.notes: list[str] = []
        if not len(self.table):
            raise UserError(f"{tables.origin} has no interactions. Check data.root or data.path.")

    def keep(self, mask: np.ndarray, reason: str) -> None:
        """Drop the rows outside `mask` and count what went.

        Raises:
            UserError: nothing is left; it names the filter and how much there was before.
        """
        if mask.all():
            return
        before = self._counts()
        self.table, self.users, self.items = self.table[mask], self.users[mask], self.items[mask]
        after = self._counts()
        if not after["interactions"]:
            raise UserError(
                f"No interaction of '{self.name}' is left after the filter {reason}; before it there were "
                f"{before['interactions']} interactions of {before['users']} users with {before['items']} items. "
                "Relax that filter or take more data."
            )
        self.dropped[reason] = {key: before[key] - after[key] for key in before}

    def keep_known(self, split: np.ndarray, name: str, *kinds: str) -> np.ndarray:
        """Drop what is held out of `users`, or of these and `items`, without training; `[N]` -> the split of what is left."""
        for kind in kinds:
            known = ~s.without_history(split, getattr(self, kind))
            self.keep(known, f"split={name} ({kind} without a training interaction)")
            split = split[known]
        return split

    def sort(self, *ties: np.ndarray) -> np.ndarray:
        """Order by user and time, at the same time by `ties` `[N]`, by position and as in the file; return the order `[N]`."""
        time, *position = self.times
        order = np.lexsort((*position, *ties, time, self.users))
        self.table, self.users, self.items = self.table.iloc[order], self.users[order], self.items[order]
        return order

    @property
    def times(self) -> list[np.ndarray]:
        """The time `[N]`, and where there is one besides the position `[N]`."""
        return [self.table[name].to_numpy() for name in ("time", POSITION) if name in self.table]

    def note(self, text: str) -> None:
        self.notes.append(text)

    @staticmethod
    def present(codes: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number the codes that occur from 0 without gaps, in their order; return the new codes and their ids."""
        occurs = np.bincount(codes, minlength=len(ids)) > 0
        return (np.cumsum(occurs) - 1)[codes], ids[occurs]

    def _counts(self) -> dict[str, int]:
        return {
            "users": int(np.count_nonzero(np.bincount(self.users))),
            "items": int(np.count_nonzero(np.bincount(self.items))),
            "interactions": len(self.users),
        }
