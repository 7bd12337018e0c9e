"""A folder of tables: `data=local data.path=FOLDER`, and every named set below `data.root`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_llmers.data import DataConfig
from lit_llmers.data.interactions import Tables, folder_fingerprint, read_folder
from lit_llmers.data.texts import add_texts, texts_fingerprint


@dataclass(frozen=True)
class Folder:
    """Tables in `path`, in any of the formats of `lit_llmers.data.interactions`."""

    path: Path
    config: DataConfig

    def fingerprint(self) -> dict[str, Any]:
        texts = texts_fingerprint(self.path, self.config.texts)
        files = folder_fingerprint(self.path) | ({"texts": texts} if texts else {})
        return {"files": files, "columns": asdict(self.config.columns)}

    def load(self) -> Tables:
        tables = read_folder(
            self.path,
            self.config.columns,
            split=self.config.split == "given",
            rating=self.config.min_rating is not None,
        )
        return add_texts(tables, self.path, self.config.texts, self.config.columns)
