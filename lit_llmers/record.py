"""The `record` stage: ask a trained teacher about every training target, once, and keep the answers on disk.

Students then learn from the record and no LLM stands in their process. With `signals.online` the stage records nothing
and the frozen teacher runs beside the student instead, behind the same interface.
"""

import logging
import time
from typing import Any

import torch
from torch import Tensor

from lit_llmers.callbacks.distillation import SignalSource
from lit_llmers.conf.schema import RecordStage
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.loader import Batch, OrderedBatches
from lit_llmers.data.sequences import TrainingRows
from lit_llmers.errors import UserError
from lit_llmers.losses.feature import block_boundaries
from lit_llmers.models import load_dataset, load_model
from lit_llmers.signals import SignalReader, SignalSpec, SignalWriter
from lit_llmers.stages import Stage
from lit_llmers.students.sequential import SequentialRecommender

log = logging.getLogger(__name__)


def block_states(model: SequentialRecommender, batch: Batch, boundaries: list[int]) -> Tensor:
    """Hidden states at the block ends for every target of the batch: `[T, blocks, D]`, without gradient."""
    with torch.inference_mode():
        hidden = model(batch, with_hidden=True).hidden
    assert hidden is not None
    return torch.stack([hidden[layer] for layer in boundaries], 1)


class RecordedTeacher:
    """The teacher's block states, gathered from its record by the number of the target."""

    def __init__(self, reader: SignalReader) -> None:
        self.reader, self.shape = reader, tuple(reader.shape)

    def read(self, batch: Batch) -> Tensor:
        return self.reader[batch["target_row"].cpu()]


class OnlineTeacher:
    """The frozen teacher itself, asked anew about every batch."""

    def __init__(self, model: SequentialRecommender, boundaries: list[int]) -> None:
        self.model, self.boundaries = model.eval().requires_grad_(False), boundaries
        self.shape: tuple[int, ...] = (len(boundaries), model.backbone.width)

    def read(self, batch: Batch) -> Tensor:
        self.model.to(batch["items"].device)
        return block_states(self.model, batch, self.boundaries).clone()


def open_signals(stage: Stage, rows: TrainingRows) -> SignalSource:
    """What a record stage left, for a student that trains on these rows.

    Raises:
        UserError: the record is of another split or teacher, of another format, or damaged.
    """
    config: RecordStage = stage.config
    teacher = stage.need(config.of)
    if config.signals.online:
        model = _load_teacher(teacher, rows.dataset)
        return OnlineTeacher(model, _boundaries(model, config))
    return RecordedTeacher(SignalReader(stage.folder / config.record, teacher=teacher.fingerprint, split=rows.fingerprint))


def run(stage: Stage) -> dict[str, Any]:
    """Record the teacher, shard by shard; whole shards of an interrupted pass are kept."""
    config: RecordStage = stage.config
    teacher = stage.need(config.of)
    dataset = load_dataset(stage)
    rows = TrainingRows(dataset, teacher.config.sequences)
    model = _load_teacher(teacher, dataset)
    boundaries = _boundaries(model, config)
    if config.signals.online:
        return {"rows": rows.targets, "bytes": 0, "online": True}
    device = torch.device("cuda" if torch.cuda.is_available() and teacher.config.trainer.accelerator != "cpu" else "cpu")
    model.to(device)
    shape = (len(boundaries), model.backbone.width)
    spec = SignalSpec(
        name=config.record,
        rows=rows.targets,
        shape=shape,
        dtype=config.signals.dtype,
        teacher=teacher.fingerprint,
        split=rows.fingerprint,
        rows_per_shard=config.signals.shard_rows,
    )
    writer = SignalWriter(stage.folder / config.record, spec)
    started, recorded = time.perf_counter(), 0
    for targets in writer.missing():
        with writer.shard(targets) as shard:
            for batch in OrderedBatches(rows, config.batch_size, targets):
                states = block_states(model, {key: value.to(device) for key, value in batch.items()}, boundaries)
                number = batch["target_row"]
                inside = (number >= targets.start) & (number < targets.stop)
                shard.write(number[inside].numpy(), states.cpu()[inside])
        recorded += len(targets)
        log.info("%-24s %d of %d targets", stage.label, targets.stop, rows.targets)
    writer.finish()
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in (stage.folder / config.record).glob("*.npy"))
    return {"rows": rows.targets, "bytes": size, "seconds": seconds, "rows_per_second": recorded / max(seconds, 1e-9)}


def _load_teacher(stage: Stage, dataset: Dataset) -> SequentialRecommender:
    model = load_model(stage, dataset)
    if not isinstance(model, SequentialRecommender):
        raise UserError(f"Stage '{stage.name}' is no sequential model: it has no hidden states to record. Record another one.")
    return model


def _boundaries(model: SequentialRecommender, config: RecordStage) -> list[int]:
    layers = model.backbone.layers
    try:
        return block_boundaries(layers, config.blocks)
    except ValueError as error:
        raise UserError(
            f"The teacher '{config.of}' has {layers} layers, which cannot be cut into {config.blocks} equal blocks. "
            f"Choose stages.{config.of}.model.layers divisible by the blocks of the record stage."
        ) from error
