"""Stored candidates, so that every model and every run ranks a target among the same items.

A stored file is an npy array `[rows, N]` of item indices, one row for each row of `EvaluationRows`, 0 for none, with
`FILE.json` beside it that has its SHA-256 and the fingerprint of the split it belongs to. A file of the user's own is such a
pair, or a parquet table in terms of the original ids: `user_id`, `item_id` (the held-out item) and `candidates` (a list of
item ids), one row for each held-out interaction, in any order.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow

from lit_llmers.data.dataset import Dataset, distinct
from lit_llmers.data.interactions import as_ids
from lit_llmers.data.sequences import EvaluationRows
from lit_llmers.data.table import read_parquet
from lit_llmers.errors import UserError
from lit_llmers.files import atomic_write, read_json, sha256, write_json

CANDIDATES_VERSION = 1
_SPARSE = 8  # times as many items as candidates make drawing them one by one the faster way


def make_candidates(
    items: np.ndarray,
    offsets: np.ndarray,
    n_items: int,
    user: np.ndarray,
    target: np.ndarray,
    n: int = 999,
    seed: int = 0,
) -> np.ndarray:
    """Draw for every evaluation row n different items, uniformly among those its user meets in no part of the split.

    Args:
        items: `[N]` item indices 1..n_items, users one after the other, train, validation and test.
        offsets: `[U+1]`; user u owns `items[offsets[u]:offsets[u+1]]`.
        n_items: size of the catalogue.
        user: `[rows]` user index of each evaluation row.
        target: `[rows]` its target, which is never drawn.
        n: candidates per row.
        seed: of the draw; equal arguments give equal candidates.

    Returns:
        `[rows, n]` int32.

    Raises:
        UserError: a user has fewer than n items left to draw from.
    """
    rng = np.random.default_rng(seed)
    out = np.empty((len(user), n), dtype=np.int32)
    left = np.arange(len(user))
    if n_items > _SPARSE * n:
        left = _draw_and_reject(out, items, offsets, n_items, user, target, rng)
    step = max(1, 2**22 // (n_items + 1))  # 16 MB of keys
    for start in range(0, len(left), step):
        rows = left[start : start + step]
        who = user[rows]
        keys = rng.random((len(who), n_items + 1), dtype=np.float32)  # the n smallest keys are a uniform draw
        lengths = offsets[who + 1] - offsets[who]
        row = np.repeat(np.arange(len(who)), lengths)
        at = np.arange(len(row)) + np.repeat(offsets[who] - np.cumsum(lengths) + lengths, lengths)
        keys[row, items[at]] = 2  # above every key
        keys[np.arange(len(who)), target[rows]] = 2
        keys[:, 0] = 2
        _enough((keys < 2).sum(1), who, n, n_items, "number {}")
        out[rows] = np.argpartition(keys, n - 1, axis=1)[:, :n]
    return out


def _draw_and_reject(
    out: np.ndarray,
    items: np.ndarray,
    offsets: np.ndarray,
    n_items: int,
    user: np.ndarray,
    target: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Fill rows of `out` `[rows, n]` with the first n different items of a row of draws that are neither met nor the target.

    A key for every item, of which a million rows among 100,000 items need an hour, is left to the rows that this returns: the
    few whose draws do not last.
    """
    n, stride = out.shape[1], n_items + 1
    number = n + n // 4 + 16
    met = distinct(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * stride + items)
    left = []
    step = max(1, 2**20 // number)
    for start in range(0, len(user), step):
        who = user[start : start + step, None]
        drawn = rng.integers(1, stride, (len(who), number))
        keys = who * stride + drawn
        good = met[np.minimum(np.searchsorted(met, keys), len(met) - 1)] != keys
        good &= drawn != target[start : start + step, None]
        order = np.argsort(drawn, axis=1, kind="stable")
        ascending = np.take_along_axis(drawn, order, 1)
        again = np.zeros_like(good)
        np.put_along_axis(again, order[:, 1:], ascending[:, 1:] == ascending[:, :-1], 1)
        place = (good & ~again).cumsum(1)
        lasts = place[:, -1] >= n
        out[start : start + step][lasts] = drawn[lasts][(good & ~again & (place <= n))[lasts]].reshape(-1, n)
        left.append(start + np.flatnonzero(~lasts))
    return np.concatenate(left)


def check_enough(dataset: Dataset, user: np.ndarray, n: int) -> None:
    """Check that n items are left to draw from for each of the users `[rows]`, without drawing.

    Raises:
        UserError: a user has met too many.
    """
    owner = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))
    met = distinct(owner * (dataset.n_items + 1) + dataset.items)
    left = dataset.n_items - np.bincount(met // (dataset.n_items + 1), minlength=dataset.n_users)
    _enough(left[user], dataset.users[user], n, dataset.n_items, "'{}'")


def _enough(left: np.ndarray, user: np.ndarray, n: int, n_items: int, called: str) -> None:
    """Refuse users `[rows]`, as messages have them `called`, of whom one has fewer than n items `left` `[rows]`."""
    if left.min() < n:
        raise UserError(
            f"evaluation.protocol=sampled-{n} needs {n} items that a user never met, but user "
            f"{called.format(user[left.argmin()])} has only {left.min()} of the catalogue's {n_items} left. "
            "Use evaluation.protocol=full."
        )


def save_candidates(path: Path, candidates: np.ndarray, split: str) -> None:
    """Write candidates `[rows, n]` as npy, and `<path>.json` with their SHA-256 and the split's fingerprint."""
    path = Path(path)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, candidates, allow_pickle=False)
    rows, n = candidates.shape
    record = {"version": CANDIDATES_VERSION, "split": split, "rows": rows, "n": n, "sha256": sha256(path)}
    write_json(path.with_name(path.name + ".json"), record)


def load_candidates(path: Path, split: str, cure: str = "Remove it to draw it anew.") -> tuple[np.ndarray, str]:
    """Read the stored candidates of the split with this fingerprint.

    Args:
        cure: the end of every message.

    Returns:
        `[rows, n]` int32, and the file's SHA-256, which belongs into the result.

    Raises:
        UserError: the file or its record is missing, damaged, of another version or of another split.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing. {cure}")
    beside = path.with_name(f"{path.name}.json")
    record = read_json(beside) if beside.is_file() else None
    if not isinstance(record, dict) or not {"version", "split", "sha256"} <= record.keys():
        raise UserError(f"{path} needs its record {beside.name} beside it, as a run with sampled candidates writes it. {cure}")
    if record["version"] != CANDIDATES_VERSION:
        raise UserError(f"{path} has format version {record['version']}, not {CANDIDATES_VERSION}. {cure}")
    if record["split"] != split:
        raise UserError(f"{path} holds candidates for the split {record['split']}, not for {split}. {cure}")
    if sha256(path) != record["sha256"]:
        raise UserError(f"{path} was altered (its checksum is not the stored one). {cure}")
    return np.load(path, allow_pickle=False), record["sha256"]


def read_candidates(path: Path, dataset: Dataset, rows: EvaluationRows) -> tuple[np.ndarray, str]:
    """Read a file of the user's own, npy or parquet, for these evaluation rows; see the module for the formats.

    An item that a row names twice counts once.

    Returns:
        `[rows, N]` int32, 0 for none, and the file's SHA-256.

    Raises:
        UserError: the file is missing or damaged; it is of another split or of other users; an item is unknown; a row has
            no candidate.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        candidates, digest = _from_table(path, dataset, rows), sha256(path)
    else:
        cure = "Set evaluation.candidates to a file that was made for this data set and split, or to a parquet table."
        candidates, digest = load_candidates(path, dataset.fingerprint, cure)
        if candidates.ndim != 2 or len(candidates) != len(rows) or candidates.dtype.kind not in "iu":
            raise UserError(
                f"{path} is {candidates.dtype} {list(candidates.shape)}. It must hold whole numbers, [{len(rows)}, N]: one row "
                "for each held-out interaction."
            )
        if candidates.size and not 0 <= candidates.min() <= candidates.max() <= dataset.n_items:
            raise UserError(f"{path} names items outside of 0..{dataset.n_items}. {cure}")
    candidates = np.sort(candidates, axis=1)
    candidates[:, 1:][candidates[:, 1:] == candidates[:, :-1]] = 0
    alone = np.flatnonzero(~((candidates > 0) & (candidates != rows.target[:, None])).any(1))
    if alone.size:
        user = dataset.users[rows.user[alone[0]]]
        raise UserError(f"{path} has no candidate beside the held-out item for user '{user}' ({alone.size} rows). Add some.")
    return candidates.astype(np.int32), digest


def _times(number: int) -> str:
    """A number of times in words, none for 0."""
    return {0: "", 1: "once", 2: "twice"}.get(number, f"{number} times")


def _from_table(path: Path, dataset: Dataset, rows: EvaluationRows) -> np.ndarray:
    """The candidates `[rows, N]` of a parquet table, in the order of the evaluation rows."""
    try:
        table = read_parquet(path, ["user_id", "item_id", "candidates"])
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}). It must be a parquet table with the columns user_id, "
            "item_id (the held-out item) and candidates (a list of item ids)."
        ) from error
    item_ids = dataset.catalogue["item_id"].to_numpy(dtype=object)
    wanted = pd.DataFrame({"user_id": dataset.users[rows.user], "item_id": item_ids[rows.target - 1]}).astype(str)
    given = pd.DataFrame({name: as_ids(table[name], name, str(path)) for name in ("user_id", "item_id")})
    for one, other, what in ((given, wanted, "is in it but not"), (wanted, given, "is not in it but")):
        strangers = one["user_id"][~one["user_id"].isin(other["user_id"])]
        if len(strangers):
            raise UserError(
                f"{path} is of other users: '{strangers.iloc[0]}' {what} among those with a held-out interaction "
                f"({strangers.nunique()} such users). Set evaluation.candidates to a file of this data set and split."
            )
    keys = [pd.MultiIndex.from_frame(x.assign(nth=x.groupby(["user_id", "item_id"]).cumcount())) for x in (given, wanted)]
    place = keys[0].get_indexer(keys[1])
    if (place < 0).any() or len(given) != len(wanted):
        user, item, _ = keys[1][place < 0][0] if (place < 0).any() else keys[0].difference(keys[1])[0]
        stands, held = (_times(((x["user_id"] == user) & (x["item_id"] == item)).sum()) for x in (given, wanted))
        if stands and held:
            raise UserError(
                f"{path}: user '{user}' with item '{item}' stands in it {stands} and is held out {held}. Give one row for each "
                "held-out interaction."
            )
        raise UserError(
            f"{path} is of another split: user '{user}' and item '{item}' are a held-out interaction in only one of the two. "
            "Set evaluation.candidates to a file of this split."
        )
    lists = table["candidates"]
    whole = lists.map(lambda items: isinstance(items, np.ndarray) and not pd.isna(items).any()).to_numpy(dtype=bool)
    if not whole.all():
        raise UserError(
            f"{path} has no list of candidates for user '{given['user_id'][whole.argmin()]}', or a gap in it ({(~whole).sum()} "
            "such rows). Give each row a list of item ids."
        )
    lists = lists.iloc[place]
    count = lists.map(len).to_numpy()
    named = as_ids(pd.Series(np.concatenate(lists.to_list())), "candidates", f"{path}, lists end to end").to_numpy(dtype=object)
    codes = pd.Index(item_ids).get_indexer(named) + 1
    if (codes == 0).any():
        first = named[(codes == 0).argmax()]
        raise UserError(f"{path} names item '{first}', which is not in the data ({(codes == 0).sum()} unknown). Leave it out.")
    out = np.zeros((len(rows), count.max()), np.int32)
    out[np.arange(out.shape[1]) < count[:, None]] = codes
    return out
