"""Texts that an LLM wrote about the items or the users of a data set, in files beside its interactions.

A file `llm_item_NAME` or `llm_user_NAME` (parquet, CSV or JSON lines) has the id and the text, one row for each item or user.
What an LLM wrote from interactions may betray those that are held out. So every text of users counts as leaking, and so does a
text of items unless it is said to be made from the items' attributes: `{"made_from": "attributes"}` in a file
`llm_item_NAME.json` beside it, or `data.made_from`, as the YAML of a shipped data set has it for published texts.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from lit_llmers.data import ORIGINS, DataConfig
from lit_llmers.data.interactions import Tables, as_ids, as_strings
from lit_llmers.data.table import Table, open_table
from lit_llmers.errors import UserError, unknown
from lit_llmers.files import read_json, sha256

USUAL_NAMES = ("llm_text", "text", "profile", "summary", "description")
SUFFIXES = (".parquet", ".csv", ".jsonl")


def texts_fingerprint(folder: Path, config: DataConfig) -> dict[str, list[str]]:
    """SHA-256 of the files of `data.texts`, with what stands beside them, and that one leaks where no file says so."""
    out = {}
    for name, entry in about_texts(folder, config).items():
        files = [sha256(path) for path in (_find(folder, name), _manifest(folder, name)) if path.is_file()]
        silent = entry["of"] == "items" and entry["leaks"] and _said(folder, name) != "interactions"
        out[name] = [*files, *(["leaks"] if silent else [])]
    return out


def about_texts(folder: Path, config: DataConfig) -> dict[str, dict[str, Any]]:
    """Of each of `data.texts` whether it is of items or users (`of`), and whether it `leaks`.

    Raises:
        UserError: a manifest is wrong.
    """
    about = {}
    for name in config.texts:
        of = "users" if name.startswith("llm_user_") else "items"
        origins = {_said(folder, name), config.made_from.get(name)} - {None} if of == "items" else set()
        about[name] = {"of": of, "leaks": origins != {"attributes"}}
    return about


def check_leaks(name: str, read: list[str], allowed: list[str], about: dict[str, dict[str, Any]]) -> None:
    """Refuse that a stage reads what may have been written with held-out items in view.

    Args:
        name: of the stage.
        read: texts and other columns.
        allowed: `allow_leaking` of the stage.
        about: as of `about_texts`.

    Raises:
        UserError: one of them leaks and is not allowed.
    """
    for text in leaking(read, about):
        if text not in allowed:
            silent = (
                f'If it was written from facts of items alone, say so in {text}.json beside it: {{"made_from": "attributes"}}. '
            )
            raise UserError(
                f"'{text}' was or may have been written from users' interactions, the held-out ones perhaps among them: test "
                f"figures of what reads it may be too high. {silent if about[text]['of'] == 'items' else ''}To read it all the "
                f"same, with a warning in the report, set stages.{name}.allow_leaking=[{text}]."
            )


def leaking(read: list[str], about: dict[str, dict[str, Any]]) -> list[str]:
    """Those of the columns read that are texts which may have been written with held-out items in view."""
    return [name for name in read if name in about and about[name]["leaks"]]


def add_texts(tables: Tables, folder: Path, config: DataConfig) -> Tables:
    """The tables with `data.texts`: those of items become columns of the catalogue, those of users the table `users`.

    Raises:
        UserError: a file is not there, or its columns, ids or manifest are wrong.
    """
    if not config.texts:
        return tables
    columns, about = config.columns, about_texts(folder, config)
    items = tables.items.copy()
    users = pd.DataFrame({"user_id": tables.interactions["user_id"].unique()})
    for name in config.texts:
        of_users = about[name]["of"] == "users"
        frame, key = (users, "user_id") if of_users else (items, "item_id")
        id_names = [columns.user] if of_users else [columns.catalogue_item or columns.item, columns.item]
        path = _find(folder, name)
        frame[name] = frame[key].map(_read(open_table(path), id_names)).fillna("").astype(str)
        if not (frame[name] != "").any():
            raise UserError(
                f"{path} has no text for any {key} of the data, the first of which is '{frame[key].iloc[0]}'. Give it the "
                f"data's ids and texts that are not empty, or leave {name} out of data.texts."
            )
    has_users = len(users.columns) > 1
    return replace(tables, items=items, users=users if has_users else None, info={**tables.info, "texts": about})


def _find(folder: Path, name: str) -> Path:
    for suffix in SUFFIXES:
        if (path := folder / f"{name}{suffix}").is_file():
            return path
    files = [path for kind in ("item", "user") for path in folder.glob(f"llm_{kind}_*") if path.suffix in SUFFIXES]
    raise unknown(f"text (data.texts) of {folder}", name, {path.stem for path in files})


def _manifest(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _said(folder: Path, name: str) -> str | None:
    """What a text is made from, if a file beside it says so."""
    path = _manifest(folder, name)
    if not path.is_file():
        return None
    content: Any = read_json(path)
    made_from = content.get("made_from") if isinstance(content, dict) else None
    if made_from not in ORIGINS:
        raise unknown(f"'made_from' in {path}", str(made_from), ORIGINS)
    return str(made_from)


def _read(table: Table, id_names: list[str]) -> pd.Series:
    """The texts by id."""
    id_name = next((name for name in id_names if name in table.names), None)
    if id_name is None:
        raise UserError(f"{table.origin} has no column '{id_names[0]}'. It has: {', '.join(table.names)}. Name the ids so.")
    text_name = next((name for name in USUAL_NAMES if name in table.names), None)
    if text_name is None:
        others = table.read([name for name in table.names if name != id_name])
        words = [name for name in others.columns if pd.api.types.is_string_dtype(others[name].dropna())]
        if len(words) != 1:
            raise UserError(
                f"{table.origin} has no column of the names {', '.join(USUAL_NAMES)}, and {len(words)} others that hold text. "
                "Call the column of the texts llm_text."
            )
        text_name = words[0]
    raw = table.read([id_name, text_name]).reset_index(drop=True)
    key = as_ids(raw[id_name], id_name, table.origin)
    twice = key[key.duplicated()]
    if len(twice):
        raise UserError(f"{table.origin}: id '{twice.iloc[0]}' occurs more than once in column '{id_name}'. Keep one row each.")
    return pd.Series([text.strip() for text in as_strings(raw[text_name], " ")], index=key)
