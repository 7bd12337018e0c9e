"""Where data sets come from: one file per public source, the generated catalogue, and folders."""

from pathlib import Path
from typing import Any, Protocol

from lit_llmers.data import Columns, DataConfig, texts
from lit_llmers.data.interactions import Tables
from lit_llmers.data.sources.amazon import AmazonReviews2023
from lit_llmers.data.sources.demo import Demo
from lit_llmers.data.sources.folder import Folder
from lit_llmers.data.sources.movielens import MovieLens
from lit_llmers.errors import UserError


class Source(Protocol):
    """One data set."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able identity of the content, without paths; cheap, and without network."""

    def load(self) -> Tables:
        """Read (and where needed fetch) the data set.

        Raises:
            UserError: it cannot be had, or what it says is wrong.
        """


def about_texts(config: DataConfig) -> dict[str, dict[str, Any]]:
    """What is known of `data.texts` before they are read: `lit_llmers.data.texts.about_texts`."""
    source = source_of(config)
    return texts.about_texts(source.path, config) if isinstance(source, Folder) else {}


def source_of(config: DataConfig) -> Source:
    """Choose the source: the generator, the folder that was named, or else the publisher.

    Raises:
        UserError: `data=local` without `data.path`, a folder for the generated catalogue, or texts or names of columns
            where no folder is read.
    """
    if config.texts and config.source != "folder" and config.root is None:
        raise UserError(
            f"data.texts={config.texts} are files beside the interactions. Name the folder that has {config.name} with "
            "data.root=FOLDER, or leave them out."
        )
    if config.source == "demo":
        if config.root is not None or config.path is not None:
            place, named = ("root", "ml-1m") if config.path is None else ("path", "local")
            raise UserError(
                f"data={config.name} is generated and reads no data.{place}. Say which data lie there: data={named}."
            )
        _refuse_columns(config, "is generated")
        return Demo(config.generator)
    if config.source == "folder":
        if config.path is None:
            raise UserError("data=local needs data.path=FOLDER, the folder with interactions.* and items.*.")
        return Folder(Path(config.path).expanduser(), config)
    if config.root is not None:
        return Folder(Path(config.root).expanduser() / config.name, config)
    _refuse_columns(config, "comes from its publisher")
    if config.source == "movielens":
        return MovieLens(config)
    return AmazonReviews2023(config)


def _refuse_columns(config: DataConfig, comes: str) -> None:
    """Names of columns would be ignored; `categories` and `text` are given by the named data sets themselves."""
    usual = Columns()
    for part in ("user", "item", "catalogue_item", "time", "rating", "split", "title"):
        if getattr(config.columns, part) != getattr(usual, part):
            raise UserError(
                f"data.columns.{part} names a column of a folder's tables, but {config.name} {comes}. Leave it out, or name "
                "the folder with data.root=FOLDER."
            )
