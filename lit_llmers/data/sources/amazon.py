"""Amazon reviews from the Hugging Face hub: the 2023 edition of McAuley Lab.

Y. Hou, J. Li, Z. He, A. Yan, X. Chen, J. McAuley, "Bridging Language and Items for Retrieval and Recommendation",
arXiv 2403.03952, 2024. https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023

The editions of 2014 and 2018, on which most papers report, are not on the hub in this form. The 2023 edition has other
users, items and categories: figures on it cannot be compared with theirs. For those editions name a folder with
`data.root`.
"""

import json
import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lit_llmers.data import Columns, DataConfig
from lit_llmers.data.interactions import Tables, read_folder
from lit_llmers.data.sources.movielens import cache_folder
from lit_llmers.errors import UserError
from lit_llmers.files import atomic_write

REPOSITORY = "McAuley-Lab/Amazon-Reviews-2023"
REVISION = "2b6d039ed471f2ba5fd2acb718bf33b0a7e5598e"
TIMEOUT = 10  # seconds without an answer
COLUMNS = Columns(time="timestamp", categories=["categories"], text=["description"])
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AmazonReviews2023:
    """The published 5-core of one category, with titles, categories and descriptions; kept in the cache folder."""

    config: DataConfig

    def __post_init__(self) -> None:
        name = self.config.name
        if self.config.category is None:
            raise UserError(
                f"{name} has no counterpart on the Hugging Face hub. Name a folder that has it with data.root=FOLDER."
            )
        if self.config.split == "given":
            raise UserError(
                f"The hub's edition of {name} has no column 'split'. Use data.split=leave-one-out or data.split=temporal, or "
                f"name a folder that has {name} with data.root=FOLDER."
            )

    def fingerprint(self) -> dict[str, Any]:
        return {"hub": REPOSITORY, "revision": REVISION, "category": self.config.category}

    def load(self) -> Tables:
        folder = cache_folder() / f"amazon-2023-{self.config.category}-{REVISION[:8]}"
        if not (folder / "interactions.parquet").exists():
            self.fetch(folder)
        tables = read_folder(folder, COLUMNS, rating=self.config.min_rating is not None)
        tables.info["notes"].append(
            f"{self.config.name} is the 2023 edition from the hub ({REPOSITORY}, {self.config.category}, 5-core): its "
            "figures cannot be compared with those of papers on the 2014 or 2018 edition."
        )
        return tables

    def fetch(self, folder: Path) -> None:
        """Write the category's interactions and the items that occur in them to `folder`; the interactions come last.

        Raises:
            UserError: no network, or no such category.
        """
        import datasets  # late: it is slow to import, and not needed for folders

        name, category = self.config.name, self.config.category
        cure = f"Name a folder that has {name} with data.root=FOLDER"
        self.check_reachable(cure)
        log.info(f"Fetching {category} of {REPOSITORY}: the item texts of a large category are some gigabytes.")
        ratings, metadata = f"benchmark/5core/rating_only/{category}.csv", f"raw/meta_categories/meta_{category}.jsonl"
        try:
            interactions = datasets.load_dataset("csv", data_files=address(ratings), split="train").to_pandas()
            # plain lines: the fields of the metadata differ from item to item, so they have no common schema
            lines = datasets.load_dataset("text", data_files=address(metadata), split="train", streaming=True)
        except FileNotFoundError as error:
            raise UserError(f"{REPOSITORY} has no category '{category}' ({error}). Correct data.category. {cure}.") from error
        interactions = interactions.rename(columns={"parent_asin": "item_id"})
        wanted = set(interactions["item_id"])
        rows = _items((line["text"] for line in lines), wanted)
        items = pd.DataFrame(rows, columns=["item_id", "title", "categories", "description"])
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in (("items", items), ("interactions", interactions)):
            with atomic_write(folder / f"{name}.parquet") as temporary:
                table.to_parquet(temporary, index=False)

    def check_reachable(self, cure: str) -> None:
        """Ask the hub for the revision, once and with a short timeout: `datasets` would try for minutes."""
        from huggingface_hub import constants

        url = f"{constants.ENDPOINT}/api/datasets/{REPOSITORY}/revision/{REVISION}"
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{url} was not asked, because HF_HUB_OFFLINE is set. {cure}, or unset it.")
        try:
            urllib.request.urlopen(url, timeout=TIMEOUT).close()
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise UserError(f"{url} cannot be reached ({error}). {cure}, or try again with network.") from error


def address(file: str) -> str:
    """Where `datasets` finds a file of the repository at the fixed revision."""
    return f"hf://datasets/{REPOSITORY}@{REVISION}/{file}"


def _items(lines: Iterator[str], wanted: set[str]) -> Iterator[dict[str, Any]]:
    """Parse the metadata of the wanted items; the file may hold an item more than once, the first counts."""
    done: set[str] = set()
    for line in lines:
        item = json.loads(line)
        key = item["parent_asin"]
        if key in wanted and key not in done:
            done.add(key)
            yield {
                "item_id": key,
                "title": item.get("title") or "",
                "categories": item.get("categories") or [],
                "description": " ".join(item.get("description") or []),
            }
