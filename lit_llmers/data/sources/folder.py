"""A folder of tables: `data=local data.path=FOLDER`, and every named set below `data.root`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_llmers.data import DataConfig
from lit_llmers.data.interactions import POSITION, Tables, folder_fingerprint, has_ties, read_folder
from lit_llmers.data.table import column_names, find_table
from lit_llmers.data.texts import add_texts, texts_fingerprint


@dataclass(frozen=True)
class Folder:
    """Tables in `path`, in any of the formats of `lit_llmers.data.interactions`."""

    path: Path
    config: DataConfig

    def fingerprint(self) -> dict[str, Any]:
        texts = texts_fingerprint(self.path, self.config)
        files = folder_fingerprint(self.path) | ({"texts": texts} if texts else {})
        names = column_names(find_table(self.path, "interactions"))
        # only where it has an effect, so that data without it keep the fingerprint that they had before there was such an order
        ties = {"ties": POSITION} if has_ties(names, self.config.columns.time) else {}
        return {"files": files, "columns": asdict(self.config.columns), **ties}

    def load(self) -> Tables:
        tables = read_folder(
            self.path,
            self.config.columns,
            split=self.config.split == "given",
            rating=self.config.min_rating is not None,
        )
        return add_texts(tables, self.path, self.config)
