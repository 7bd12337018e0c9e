"""From the columns of a catalogue, and from what users chose in training, to the texts that an encoder reads."""

from collections.abc import Callable, Sequence
from string import Formatter

import numpy as np
import pandas as pd

from lit_llmers.data.dataset import TRAIN, Dataset
from lit_llmers.errors import UserError, unknown

HISTORY = "A user chose these items, oldest first: {history}."
SEPARATOR = "; "


def check_prompt(prompt: str | None, names: Sequence[str], where: str) -> None:
    """Refuse a prompt that cannot be filled.

    Args:
        names: what may stand in braces.
        where: the key of the prompt, for the error message.

    Raises:
        UserError: a brace is open, or something else than a name stands in braces.
    """
    if prompt is None:
        return
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(prompt) if name is not None]
    except ValueError as error:
        raise UserError(f"'{where}' is no prompt: {error}. Write a brace that is meant as such twice.") from error
    for name, spec, conversion in parts:
        if name in names and (spec or conversion):
            raise UserError(f"'{where}' has a format for '{name}'. Write {{{name}}} alone: every field is a text.")
        if name not in names:
            raise unknown(f"field in braces ({where})", name, names)
    if not parts:
        raise UserError(f"'{where}' has nothing in braces, so all texts would be the same. Add one of {list(names)}.")


def item_texts(catalogue: pd.DataFrame, fields: Sequence[str], prompt: str | None = None) -> list[str]:
    """The text of every item: `prompt` with the fields in it, or the fields joined by full stops.

    An item whose fields (with a prompt, those in it) are all empty has no text: an empty one.

    Raises:
        UserError: a field is no column of the catalogue.
    """
    for name in fields:
        if name not in catalogue.columns:
            raise unknown("catalogue column (fields)", name, list(catalogue.columns))
    used = list(fields) if prompt is None else [name for name in fields if f"{{{name}}}" in prompt]
    rows = zip(*(catalogue[name].str.strip() for name in used), strict=True)
    if prompt is None:
        return [". ".join(cell for cell in row if cell) for row in rows]
    return [prompt.format(**dict(zip(used, row, strict=True))) if any(row) else "" for row in rows]


def history_texts(dataset: Dataset, lengths: Callable[[list[str]], np.ndarray], limit: int, prompt: str | None) -> list[str]:
    """What every user chose, as a text: the titles of his TRAINING items, oldest first, the latest that fit.

    Args:
        lengths: the number of tokens of each text, uncut.
        limit: tokens that a text may have. A single title that is longer is left to the encoder to cut.
        prompt: has `{history}` where the titles go.

    Returns:
        U texts, empty for a user none of whose training items has a title.
    """
    prompt = prompt or HISTORY
    titles = dataset.catalogue["title"].str.strip().tolist()
    frame, empty, separator = lengths(["", prompt.format(history=""), SEPARATOR])  # a tokenizer may put tokens around any text
    size = lengths([title + SEPARATOR for title in titles]) - frame
    room = limit - empty + separator - frame  # no separator after the last
    chosen: list[list[int]] = []
    for start, stop in zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True):
        items = dataset.items[start:stop][dataset.split[start:stop] == TRAIN].astype(np.int64) - 1
        named = np.array([item for item in items[-limit:] if titles[item]], dtype=np.int64)  # a title has a token or more
        fit = int((np.cumsum(size[named[::-1]]) <= room).sum())
        chosen.append(named[len(named) - max(fit, 1) :].tolist() if len(named) else [])

    def text(user: int) -> str:
        names = [titles[item] for item in chosen[user]]
        return prompt.format(history=SEPARATOR.join(names)) if names else ""

    texts = [text(user) for user in range(dataset.n_users)]
    left = np.array([user for user, items in enumerate(chosen) if len(items) > 1], dtype=np.int64)
    while len(left):  # tokens of the parts do not add up exactly to those of the whole
        left = left[lengths([texts[user] for user in left]) > limit]
        for user in left:
            chosen[user].pop(0)
            texts[user] = text(user)
        left = left[[len(chosen[user]) > 1 for user in left]] if len(left) else left
    return texts
