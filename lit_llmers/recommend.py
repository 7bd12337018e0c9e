"""`python -m lit_llmers.recommend run=FOLDER history="TITLE; TITLE"`: ask an exported student what comes next.

A collaborative student is asked by `user=ID`."""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lit_llmers.errors import UserError, nearest, unknown
from lit_llmers.serving import OnnxScorer, TorchScorer, find_export, read_config
from lit_llmers.serving.exported import CONFIG, GRAPH, ITEMS, USERS

if TYPE_CHECKING:
    from pyarrow import Table

RUNTIMES = ("onnx", "torch")
KEYS = ("run", "user", "history", "history_ids", "top", "repeats", "as")
REPEATS = {"true": True, "false": False}
WIDTH = 60  # characters of a title in the table
LAST = 3  # titles that a known user met, named above the table
USAGE = """usage: python -m lit_llmers.recommend run=FOLDER history="TITLE; TITLE" [key=value ...]

Prints the titles that an exported student would show next, best first, with their scores.

  run=FOLDER                 a run, such as runs/slmrec/default, or the folder of an export
  history="TITLE; TITLE"     what the user chose so far, oldest first; a part of a title does if no other has it
  history_ids="ID; ID"       the same by item id
  user=ID                    whom to recommend for, for a student that knows each user (bpr-mf, lightgcn, ...): a user of the
                             data it was trained on; what history= names counts as met too
  top=10                     how many titles
  repeats=true|false         whether titles that the user met may come again; by default as the student was evaluated: false,
                             unless its run was given evaluation.mask_history=false
  as=onnx|torch              what runs the student; by default ONNX Runtime, where model.onnx was exported
"""


class Users:
    """The users that a collaborative student knows.

    Args:
        user_ids: `[U]`.
        met: from a row 0..U-1 to the items that the user has met, oldest first.
    """

    def __init__(self, user_ids: Iterable[str], met: Callable[[int], list[int]]) -> None:
        self._rows = {user_id: row for row, user_id in enumerate(user_ids)}
        self.met = met

    def find(self, user_id: str) -> int:
        """The row of the user with that id.

        Raises:
            UserError: there is none.
        """
        if user_id not in self._rows:
            raise UserError(
                f"The student knows no user with the id '{user_id}'.{nearest(user_id, self._rows)} It knows the "
                f"{len(self._rows)} users of the data it was trained on. For others train a student that reads histories, "
                "such as student=sasrec."
            )
        return self._rows[user_id]


class Recommender:
    """A student and its catalogue.

    Args:
        item_ids, titles, categories: of the items 1, 2, ...
        max_length: items of history that the student reads, the latest ones.
        scorer: from histories `[B, L]` int64, left-padded with 0, to scores `[B, n+1]`; with `users` from their rows `[B]`.
        users: those that a student knows which reads no history.
        repeats: recommend what the user has met too.
    """

    def __init__(
        self,
        item_ids: Sequence[str],
        titles: Sequence[str],
        categories: Sequence[str],
        max_length: int,
        scorer: Callable[[np.ndarray], np.ndarray],
        users: Users | None = None,
        repeats: bool = False,
    ) -> None:
        self.item_ids, self.categories = ["", *item_ids], ["", *categories]
        self.titles = ["", *(title if title.strip() else item_id for title, item_id in zip(titles, item_ids, strict=True))]
        self.max_length, self.scorer, self.users, self.repeats = max_length, scorer, users, repeats
        self._plain = [_plain(title) for title in self.titles]
        self._exact = _index(self._plain)
        self._short = _index(map(_short, self._plain))
        self._ids = {item_id: index for index, item_id in enumerate(self.item_ids) if index}

    @classmethod
    def load(cls, folder: Path | str, runtime: str | None = None, repeats: bool | None = None) -> "Recommender":
        """Open the export of a run, or an export folder.

        Args:
            folder: of the run or of the export.
            runtime: `onnx` or `torch`; by default ONNX where it was exported.
            repeats: recommend what the user has met too; by default as the student was evaluated.

        Raises:
            UserError: there is no finished export, a file is missing, damaged or of another export, or the runtime is unknown.
        """
        export = find_export(Path(folder))
        config = read_config(export)
        runtime = runtime or ("onnx" if (export / GRAPH).is_file() else "torch")
        if runtime not in RUNTIMES:
            raise unknown("runtime (as)", runtime, RUNTIMES)
        items = _read(export / ITEMS, config["n_items"]).to_pydict()
        users = None
        if "user" in config.get("inputs", []):  # exports from before there were such students do not name their inputs
            table = _read(export / USERS, config["n_users"])
            users = Users(table["user_id"].to_pylist(), lambda row: table["items"][row].as_py())
        scorer = OnnxScorer(export / GRAPH) if runtime == "onnx" else TorchScorer(export)
        if repeats is None:
            repeats = not config.get("mask_history", True)  # older exports do not say how they were evaluated
        return cls(items["item_id"], items["title"], items["categories"], config["max_length"], scorer, users, repeats)

    def recommend(self, history: list[str] | str, top: int = 10, user: str | None = None) -> list[tuple[str, float]]:
        """The `top` best titles for a history of titles, oldest first, or for a user, with their scores, best first.

        Args:
            history: titles; one alone need not be a list.

        Raises:
            UserError: see `rank`; or a title is unknown or could be several.
        """
        titles = [history] if isinstance(history, str) else history
        ranked = self.rank([self.find(title) for title in titles], top, user)
        return [(self.titles[index], score) for index, score in ranked]

    def rank(self, history: list[int], top: int, user: str | None = None) -> list[tuple[int, float]]:
        """The `top` best items for a history of item indices, or for a user; without `repeats` those of the history and all
        that the user met are left out.

        Raises:
            UserError: the student reads the other of the two, the history is empty, the user is unknown, or `top` is not
                positive.
        """
        if top < 1:
            raise UserError(f"top is {top}. It must be at least 1.")
        if self.users is None:
            if user is not None:
                raise UserError('This student reads histories and knows no users. Give history="TITLE; TITLE" without user=.')
            if not history:
                raise UserError('The history is empty. Give at least one title: history="TITLE; TITLE".')
            asked = np.array([history[-self.max_length :]], np.int64)
        else:
            if user is None:
                raise UserError(
                    "This student knows users and reads no histories. Give user=ID, a user of the data it was trained on. For "
                    "histories train another, such as student=sasrec."
                )
            row = self.users.find(user)
            asked, history = np.array([row], np.int64), [*self.users.met(row), *history]
        scores = self.scorer(asked)[0]
        out = [0] if self.repeats else [0, *history]
        scores[out] = -np.inf
        order = np.argsort(-scores, kind="stable")[: min(top, len(scores) - len(set(out)))]
        return [(int(index), float(scores[index])) for index in order]

    # ---- from words to items ----------------------------------------------------------------------------------------

    def find(self, title: str) -> int:
        """The item that a title means, case aside: the whole title, else the only one that begins so or contains it.

        A whole title may lack a last part in brackets, such as a year, and have its article in front.

        Raises:
            UserError: none does, or several.
        """
        wanted = _plain(title)
        if not wanted:
            raise UserError("A title of the history is empty. Write it as TITLE; TITLE.")
        for found in (
            self._exact.get(wanted, []),
            self._short.get(wanted, []),
            [index for index, name in enumerate(self._plain) if name.startswith(wanted)],
            [index for index, name in enumerate(self._plain) if wanted in name],
        ):
            if len(found) == 1:
                return found[0]
            if found:
                named = "; ".join(f"{self.titles[index]} (id {self.item_ids[index]})" for index in found[:8])
                more = f" and {len(found) - 8} more" if len(found) > 8 else ""
                raise UserError(
                    f"'{title}' could be: {named}{more}. Write the whole title, or give the id: history_ids=\"ID; ID\"."
                )
        names = [*self._exact, *self._short]
        close = get_close_matches(wanted, names, n=1, cutoff=0.6)
        index = (self._exact.get(close[0]) or self._short[close[0]])[0] if close else 0
        hint = f" Did you mean '{self.titles[index]}'?" if index else " Write a word of it, or give ids: history_ids=ID."
        raise UserError(f"No item's title contains '{title}'.{hint}")

    def find_id(self, item_id: str) -> int:
        """The item of that id.

        Raises:
            UserError: there is none.
        """
        if item_id not in self._ids:
            raise UserError(f"There is no item with the id '{item_id}'.{nearest(item_id, self._ids)}")
        return self._ids[item_id]

    def split(self, text: str) -> list[str]:
        """Cut `TITLE; TITLE` at its semicolons, save those inside a title that the catalogue has."""
        return _at_semicolons(text, lambda part: _plain(part) in self._exact)

    def split_ids(self, text: str) -> list[str]:
        """Cut `ID; ID` at its semicolons, save those inside an id, and at its commas where what they are in is no id."""
        parts = _at_semicolons(text, self._ids.__contains__)
        ids = [item_id.strip() for part in parts for item_id in ([part] if part in self._ids else part.split(","))]
        return [item_id for item_id in ids if item_id]


def _at_semicolons(text: str, known: Callable[[str], bool]) -> list[str]:
    """Cut at semicolons, save those inside the longest parts that are known."""
    parts, found = text.split(";"), []
    while parts:
        size = next((size for size in range(len(parts), 1, -1) if known(";".join(parts[:size]).strip())), 1)
        found.append(";".join(parts[:size]).strip())
        parts = parts[size:]
    return [part for part in found if part]


def _plain(title: str) -> str:
    return " ".join(title.casefold().split())


def _short(plain: str) -> str:
    """`matrix, the (1999)` as people write it: `the matrix`."""
    bare = re.sub(r"\s*\([^()]*\)$", "", plain)
    return re.sub(r"^(.+), (the|a|an|le|la|les|der|die|das)$", r"\2 \1", bare)


def _index(names: Iterable[str]) -> dict[str, list[int]]:
    """Item indices by name; the padding has none."""
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name:
            found.setdefault(name, []).append(index)
    return found


def _read(path: Path, rows: int) -> "Table":
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        table = read_table(path)
    except (OSError, ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}). Copy the export again and completely.") from error
    if len(table) != rows:
        raise UserError(
            f"{path} is not of the model in {CONFIG}: it has {len(table)} rows, and the model {rows} {path.stem}. Copy the "
            "export again and completely."
        )
    return table


def table(recommender: Recommender, history: list[int], ranked: list[tuple[int, float]], user: str | None = None) -> str:
    """The user, the history as it was understood, and what comes next."""
    rows = [("", "score", "title", "categories")]
    for place, (index, score) in enumerate(ranked, 1):
        rows.append((str(place), f"{score:.3f}", _cut(recommender.titles[index]), recommender.categories[index]))
    number, score_width, title = (max(len(row[column]) for row in rows) for column in range(3))
    lines = [f"{a:>{number}}  {b:>{score_width}}  {c:<{title}}  {d}".rstrip() for a, b, c, d in rows]
    head = []
    if user is not None and recommender.users is not None:
        met = recommender.users.met(recommender.users.find(user))
        last = "; ".join(_cut(recommender.titles[index]) for index in met[-LAST:])
        head.append(f"For user {user}, who met {len(met)} items, at last: {last}")
    if history:
        head.append("After: " + "; ".join(_cut(recommender.titles[index]) for index in history))
    return "\n".join([*head, "", *lines])


def _cut(title: str) -> str:
    title = " ".join(title.split())  # one line
    return title if len(title) <= WIDTH else title[: WIDTH - 1] + "…"


def main(arguments: Sequence[str]) -> int:
    """Print recommendations and return the exit status: 0 done, 2 something that the user can mend."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    try:
        given = _parse(arguments)
        if "run" not in given:
            raise UserError("No run given. Add run=FOLDER, such as run=runs/slmrec/default.")
        if not given["top"].isdecimal():
            raise UserError(f"top={given['top']} must be a whole number, at least 1.")
        if given.get("repeats", "true") not in REPEATS:
            raise unknown("value of repeats", given["repeats"], REPEATS)
        recommender = Recommender.load(given["run"], given.get("as"), REPEATS.get(given.get("repeats", "")))
        history = [recommender.find(title) for title in recommender.split(given.get("history", ""))]
        history += [recommender.find_id(item_id) for item_id in recommender.split_ids(given.get("history_ids", ""))]
        user = given.get("user")
        print(table(recommender, history, recommender.rank(history, int(given["top"]), user), user))
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    given = {"top": "10"}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"'{argument}' is not key=value. Put titles in quotes: history=\"TITLE; TITLE\".")
        if key not in KEYS:
            raise unknown("key", key, KEYS)
        given[key] = value
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
