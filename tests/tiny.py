"""What many tests start from: the recipe at its smallest, small models, and data sets written by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lit_llmers import recipes
from lit_llmers.composing.resolving import resolve
from lit_llmers.data.dataset import TEST, TRAIN, VALID, Dataset
from lit_llmers.journal import read_metrics
from lit_llmers.stages import Stage

COMMON = [  # for any recipe
    "logger=csv",
    "data.generator.users=150",
    "data.generator.items=100",
    "data.generator.longest=20",
    "sequences.max_length=8",
    "trainer.batch_size=16",
    "trainer.max_epochs=3",
    "trainer.patience=2",
    "trainer.checkpoint_every=3",
    "trainer.log_every=1",
    "teacher.config.hidden_size=16",
    "teacher.config.intermediate_size=16",
    "teacher.config.num_attention_heads=2",
    "teacher.config.num_key_value_heads=2",
    "teacher.config.num_hidden_layers=4",
]
SMALL = [
    *COMMON,
    "stages.item_embeddings.model.dim=8",
    "stages.text.dim=8",
    "stages.teacher.model.layers=4",
    "stages.student.model.layers=2",
    "stages.signals.blocks=2",
    "stages.student.callbacks=[{feature_distillation:{from:signals}},{deep_supervision:{blocks:2}}]",
    "stages.teacher.model.dropout=0.1",
    "stages.student.model.dropout=0.1",
]
BASE = {
    "name": "tiny",
    "config": {
        "model_type": "llama",
        "vocab_size": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    },
}


def arguments(folder: Path, *overrides: str, recipe: str = "slmrec") -> list[str]:
    """The smallest recipe's overrides in `folder`, with others on top."""
    base = SMALL if recipe == "slmrec" else COMMON
    given = {override.partition("=")[0]: override for override in (*base, f"run.dir={folder}", *overrides)}
    return list(given.values())


def small(folder: Path, *overrides: str, recipe: str = "slmrec") -> list[Stage]:
    """The stages of the smallest recipe, in `folder`."""
    return resolve(recipes.compose(recipe, arguments(folder, *overrides, recipe=recipe)))


def by_name(stages: list[Stage]) -> dict[str, Stage]:
    """The stages by name; of repeated ones the last seed's."""
    return {each.name: each for each in stages}


def weights(stage: Stage) -> dict[str, torch.Tensor]:
    """The best epoch's weights of a fit stage."""
    return torch.load(stage.folder / "best.ckpt", weights_only=True)["state_dict"]


def assert_equal_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def dataset(histories: list[list[int]], n_items: int | None = None, split: list[list[int]] | None = None) -> Dataset:
    """A data set of these histories; without `split` the last item tests and the one before it validates."""
    lengths = [len(history) for history in histories]
    split = split or [[TRAIN] * (length - 2) + [VALID, TEST] for length in lengths]
    n_items = n_items or max(map(max, histories))
    ids = [str(item) for item in range(1, n_items + 1)]
    catalogue = pd.DataFrame({"item_id": ids, "title": ids, "categories": "", "text": ""})
    return Dataset(
        items=np.concatenate(histories).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        split=np.concatenate(split).astype(np.uint8),
        users=np.array([f"u{user}" for user in range(len(histories))], dtype=object),
        catalogue=catalogue,
        info={"name": "by hand", "split": "leave-one-out"},
    )


def random_dataset(users: int = 30, n_items: int = 50, longest: int = 14, seed: int = 0) -> Dataset:
    """Histories of 3 to `longest` items, drawn at random, items repeated at times."""
    rng = np.random.default_rng(seed)
    histories: list[Any] = [rng.integers(1, n_items + 1, rng.integers(3, longest + 1)).tolist() for _ in range(users)]
    return dataset(histories, n_items)


def losses(stage: Stage, name: str) -> list[float]:
    """The logged values of a loss, in order of the steps."""
    return [entry[name] for entry in read_metrics(stage.folder / "metrics.jsonl") if name in entry]
