"""The `encode` stage: item text to item vectors."""

from typing import Any

import numpy as np

from lit_llmers.conf.schema import EncodeStage
from lit_llmers.errors import unknown
from lit_llmers.files import atomic_write
from lit_llmers.models import TABLE, load_dataset
from lit_llmers.stages import Stage
from lit_llmers.text.tfidf import tfidf_svd


def run(stage: Stage) -> dict[str, Any]:
    """Write `item_table.npy`, `[n+1, dim]` float32."""
    config: EncodeStage = stage.config
    catalogue = load_dataset(stage).catalogue
    for name in config.fields:
        if name not in catalogue.columns:
            raise unknown("catalogue column (fields)", name, list(catalogue.columns))
    texts = catalogue[list(config.fields)].agg(". ".join, axis=1).tolist()
    table = tfidf_svd(texts, config.dim, stage.seed)
    with atomic_write(stage.folder / TABLE) as temporary, open(temporary, "wb") as file:
        np.save(file, table, allow_pickle=False)
    return {"items": len(texts), "dim": config.dim, "without_text": int((~table[1:].any(1)).sum())}
