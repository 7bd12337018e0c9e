"""The artefacts of `prepare` and `fit` stages, read back: data, item tables and trained models."""

from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from lit_llmers.backbones import CollaborativeBackbone, CountingBackbone
from lit_llmers.building import RECORDS, build_backbone, build_fusions, find, references
from lit_llmers.conf.stages import FitStage, InitialConfig
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.histories import Histories
from lit_llmers.data.loader import SequenceDataModule
from lit_llmers.data.pairs import PairDataModule, UnmetItems
from lit_llmers.data.sequences import TrainingRows
from lit_llmers.errors import UserError
from lit_llmers.files import readable, sha256
from lit_llmers.stages import TABLE, USER_TABLE, Stage
from lit_llmers.students.collaborative import CollaborativeRecommender
from lit_llmers.students.counting import CountingRecommender
from lit_llmers.students.negatives import UnmetDraw
from lit_llmers.students.recommender import Recommender
from lit_llmers.students.sequential import SequentialRecommender
from lit_llmers.teachers.grounding import load_grounded
from lit_llmers.text.reduction import mean_of_histories, reduce_table
from lit_llmers.text.tables import has_vector


def load_dataset(stage: Stage) -> Dataset:
    """The prepared data that a stage needs."""
    return Dataset.load(next(need for need in stage.needs if need.verb == "prepare").folder)


def load_item_table(stage: Stage, dataset: Dataset) -> torch.Tensor | None:
    """The item tables that a fit stage reads, side by side: `[n+1, sum of d]` float32.

    With several tables, each is scaled to the root mean square of the first, so that none drowns the others' part of the
    dot product.

    Raises:
        UserError: see `_load_table`.
    """
    tables = [_load_table(stage.need(name), TABLE, dataset) for name in stage.config.items]
    if not tables:
        return None
    size = [float(np.sqrt(np.mean(np.square(table[has_vector(table)])))) for table in tables]
    return torch.from_numpy(np.concatenate([table * (size[0] / own) for table, own in zip(tables, size, strict=True)], 1))


def _load_table(source: Stage, file: str, dataset: Dataset) -> np.ndarray:
    """The vectors that a stage left, `[n+1, d]` or `[U, d]`; a row of zeros is none.

    Raises:
        UserError: the file is damaged or altered, its rows are not those of the items or users, there is not one vector among
            them, or one is not finite.
    """
    with readable(source.folder / file, source.folder):
        table: np.ndarray = np.load(source.folder / file, allow_pickle=False)
    left = source.checksums.get(file)
    if left is not None and _checksum(source.folder / file, (source.folder / file).stat().st_mtime_ns) != left:
        raise UserError(
            f"{source.folder / file} was altered: its SHA-256 is not the one in DONE, of what stage '{source.name}' left. "
            f"Remove the folder {source.folder.resolve()} and give the same command again."
        )
    rows = dataset.n_items + 1 if file == TABLE else dataset.n_users
    if table.ndim != 2 or len(table) != rows:
        of = f"{dataset.n_items} items and the padding" if file == TABLE else f"{dataset.n_users} users"
        raise UserError(
            f"{source.folder / file} is {list(table.shape)}, but {of} need [{rows}, D]: it is not of these data. Remove the "
            f"folder {source.folder.resolve()} and give the same command again."
        )
    if len(wrong := np.flatnonzero(~np.isfinite(table).all(1))):
        raise UserError(
            f"Stage '{source.name}' leaves vectors that are not finite: {len(wrong)} of {len(table)} rows of its {file}, first "
            f"row {wrong[0]}. Remove {source.folder.resolve()} to make them anew, with a lower optimizer.lr or "
            "trainer.precision=32-true where they are trained."
        )
    if not has_vector(table).any():
        raise UserError(
            f"Stage '{source.name}' leaves no vector: all {len(table)} rows of its {file} are zero. Give it text to encode "
            "(fields, data.texts), or name another stage."
        )
    return table


@cache
def _checksum(path: Path, changed: int) -> str:
    """SHA-256 of a file as it is since it was `changed`, worked out once: several stages of a process read a table."""
    return sha256(path)


def build_model(stage: Stage, dataset: Dataset, trained: bool = False) -> Recommender:
    """The model of a fit stage before its training; its random weights depend on the stage's seed alone.

    Args:
        trained: its weights come from a checkpoint next, so the models that it started from are not read. (For those of an LLM
            they are: a checkpoint lacks what is frozen.)
    """
    config: FitStage = stage.config
    offered = offers(stage, dataset)
    sources = load_sources(stage, dataset, "fusion", models=not trained or "base" in config.model)
    if sources:  # a model among them was built from its own stage's seed
        L.seed_everything(stage.seed, verbose=False)
    backbone: Any = build_backbone(config, stage.seed, offered)
    if config.initial is not None:
        backbone.initialise(**_initial_tables(stage, config.initial, dataset, backbone))
    if config.fusion:
        backbone = build_fusions(config, backbone, sources, offered)
    if isinstance(backbone, CountingBackbone):
        return CountingRecommender(backbone)
    if isinstance(backbone, CollaborativeBackbone):
        return CollaborativeRecommender(backbone, config.optimizer, config.loss)
    rows = TrainingRows(dataset, config.sequences)
    popularity = torch.from_numpy(dataset.popularity()) if config.loss.kind == "sampled_softmax" else None
    unmet = None
    if config.loss.unmet and not trained:  # half a second and the pairs in memory, for training alone
        unmet = UnmetDraw.of(UnmetItems(dataset.training_pairs, dataset.users, dataset.n_items))
    per_row = backbone.mean_targets(rows.lengths, rows.targets / len(rows))
    return SequentialRecommender(backbone, config.optimizer, config.loss, per_row, popularity, unmet)


def offers(stage: Stage, dataset: Dataset) -> dict[str, Any]:
    """What backbones, fusions and callbacks get when their constructors name it; `lit_llmers.building.INJECTED`."""
    length = stage.config.sequences.max_length
    return {
        "n_items": dataset.n_items,
        "n_users": dataset.n_users,
        "max_length": length,
        "item_table": lambda: load_item_table(stage, dataset),
        "training_pairs": lambda: dataset.training_pairs,
        "popularity": lambda: torch.from_numpy(dataset.popularity()),
        "histories": lambda: Histories(dataset, length),
    }


def load_sources(stage: Stage, dataset: Dataset, room: str, models: bool = True) -> dict[str, Any]:
    """The tables of other stages that the fusions or callbacks of a fit stage read and, if asked, the models, by reference.

    What record stages left is not among them: `lit_llmers.record.open_signals`.
    """
    return {
        reference.argument: _load_source(stage.need(reference.stage), reference.kind, dataset)
        for reference in references(stage.config)
        if reference.argument.startswith(f"{room}.") and reference.kind not in RECORDS and (models or reference.kind != "model")
    }


def _load_source(source: Stage, kind: str, dataset: Dataset) -> Any:
    if kind == "model":
        return load_model(source, dataset).backbone
    return torch.from_numpy(_load_table(source, TABLE if kind == "items" else USER_TABLE, dataset))


def _initial_tables(stage: Stage, config: InitialConfig, dataset: Dataset, backbone: Any) -> dict[str, torch.Tensor]:
    """What a backbone's tables start from; a row of zeros where there is nothing to start from."""
    table = _load_table(stage.need(config.items), TABLE, dataset).astype(np.float32)
    if config.reduce is not None and table.shape[1] != backbone.dim:
        where = f"stages.{stage.name}.model.dim"
        table = reduce_table(table, backbone.dim, config.reduce, dataset.popularity(), stage.seed, where)
    if config.std is not None:
        table = table * (config.std / max(float(table[has_vector(table)].std()), 1e-12))
    tables = {"items": table}
    if isinstance(backbone, CollaborativeBackbone) and config.users:
        tables["users"] = mean_of_histories(table, dataset.training_pairs, dataset.n_users)
    return {name: torch.from_numpy(values) for name, values in tables.items()}


def data_module(stage: Stage, dataset: Dataset) -> SequenceDataModule | PairDataModule:
    """What the model of a fit stage trains and validates on."""
    config: FitStage = stage.config
    batch_size, mask_history, users = config.trainer.batch_size, config.mask_history, config.validation_users
    part = "test" if config.official_select_on_test else "valid"
    if issubclass(find("backbones", config.fit), CollaborativeBackbone):
        return PairDataModule(dataset, batch_size, config.loss.negatives, mask_history, stage.seed, users, part)
    return SequenceDataModule(dataset, config.sequences, batch_size, mask_history, stage.seed, users, part)


def load_model(stage: Stage, dataset: Dataset) -> Recommender:
    """The trained model of a fit or tune stage, at its best validation epoch, in evaluation mode.

    Raises:
        UserError: the checkpoint is missing or of another model.
    """
    path = stage.folder / "best.ckpt"
    if not path.is_file():
        raise UserError(f"There is no {path.resolve()}. Remove its folder and run the recipe again to train '{stage.label}'.")
    if stage.verb == "tune":
        return load_grounded(stage, dataset)
    L.seed_everything(stage.seed, verbose=False)
    model = build_model(stage, dataset, trained=True)
    load_weights(model, path)
    return model.eval()


def load_weights(model: Recommender, path: Path) -> None:
    """Load a checkpoint's weights without any callback.

    Raises:
        UserError: it is damaged, or the checkpoint of another model.
    """
    with readable(path, path.parent):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    try:
        model.on_load_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(f"{path.resolve()}: {error}") from error
    own = model.state_dict()
    model.load_state_dict({name: value for name, value in checkpoint["state_dict"].items() if name in own})


def count_parameters(model: Recommender) -> dict[str, int]:
    """What serves, as `serving_size` of the backbone counts it, and what of it is trained; loss terms are neither."""
    trainable = sum(each.numel() for each in model.backbone.parameters() if each.requires_grad)
    return {"total": model.backbone.serving_size(), "trainable": trainable}
