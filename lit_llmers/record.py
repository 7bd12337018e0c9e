"""The `record` stage: ask a trained teacher about every training target, or every user, and keep the answers on disk.

Students then learn from the record and no LLM stands in their process. With `signals.online` the hidden states are not
recorded and the frozen teacher runs beside the student instead, behind the same interface.
"""

if __name__ == "__main__":
    from lit_llmers.stages import no_command

    no_command("record")  # before anything that takes time is imported


import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lit_llmers.callbacks.distillation import SignalSource
from lit_llmers.conf.stages import RecordStage
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.histories import Histories
from lit_llmers.data.loader import Batch, OrderedBatches, seen_before, windows
from lit_llmers.data.sequences import TrainingRows
from lit_llmers.errors import UserError
from lit_llmers.losses.feature import block_boundaries
from lit_llmers.models import load_dataset, load_model
from lit_llmers.preemption import stop_if_asked
from lit_llmers.processes import Processes, device_of
from lit_llmers.ranking import Catalogue, top_items
from lit_llmers.signals import SHARD_BATCHES, SignalReader, SignalSpec, SignalWriter, shard_rows
from lit_llmers.stages import Stage
from lit_llmers.students.recommender import Recommender
from lit_llmers.students.sequential import SequentialRecommender
from lit_llmers.teachers.grounding import GroundedRecommender, Work

SAID = "said-{}.jsonl"  # what each process had a teacher that writes say
MET = 2**20  # items met before the targets that are ranked together, all in all

log = logging.getLogger(__name__)


# ---- what a student reads ------------------------------------------------------------------------------------------------


class RecordedStates:
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


class RecordedRanking:
    """The teacher's lists, gathered by the number of the target, or of its user.

    Attributes:
        k: length of a list; one that is shorter ends in item 0.
    """

    def __init__(self, items: SignalReader, scores: SignalReader, per: str) -> None:
        self.items, self.scores, self.per = items, scores, per
        self.k = items.shape[0]

    def read(self, batch: Batch, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Items `[T, k]` int64, best first, and their scores `[T, k]` float32, for every target of the batch or those drawn."""
        key = batch["target_row"].cpu()
        if self.per == "user":
            key = batch["user"].cpu()
            if batch["target"].dim() == 2:
                key = key.repeat_interleave((batch["target"] > 0).sum(1).cpu())
        if drawn is not None:
            key = key[drawn]
        return self.items[key].long(), self.scores[key].float()


def open_signals(stage: Stage, rows: Any) -> SignalSource | RecordedRanking:
    """What a record stage left, for a student that trains on these rows.

    Raises:
        UserError: the record is of another split or teacher, of another format, or damaged.
    """
    config: RecordStage = stage.config
    teacher = stage.need(config.of)
    if config.record == "ranking":
        split = rows.fingerprint if config.per == "target" else rows.dataset.fingerprint
        items, scores = (SignalReader(stage.folder / name, teacher=teacher.fingerprint, split=split) for name in Rankings.names)
        return RecordedRanking(items, scores, config.per)
    if config.online:
        model = _sequential(load_model(teacher, rows.dataset), config)
        return OnlineTeacher(model, _boundaries(model, config))
    return RecordedStates(SignalReader(stage.folder / config.record, teacher=teacher.fingerprint, split=rows.fingerprint))


# ---- what is asked ---------------------------------------------------------------------------------------------------------


class Question(Protocol):
    """What a teacher is asked, row by row of the record.

    Attributes:
        signals: name, shape and dtype of each answer.
        rows: number of them.
        per_batch: of rows that a batch answers, on average.
        split: fingerprint of what the rows are.
    """

    signals: dict[str, tuple[tuple[int, ...], str]]
    rows: int
    per_batch: int
    split: str

    def answers(self, rows: range, device: torch.device) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """Numbers `[T]`, not all of them in `rows`, and the answers to them."""
        ...


class BlockStates:
    """Hidden states at the block ends for every training target."""

    def __init__(self, model: Recommender, config: RecordStage, teacher: Stage, dataset: Dataset) -> None:
        self.model, self.batch_size = _sequential(model, config), config.batch_size
        self.boundaries = _boundaries(self.model, config)
        self.targets = TrainingRows(dataset, teacher.config.sequences)
        self.rows, self.split = self.targets.targets, self.targets.fingerprint
        self.per_batch = self.batch_size * -(-self.rows // len(self.targets))
        self.signals = {config.record: ((len(self.boundaries), self.model.backbone.width), config.signals.dtype)}

    def answers(self, rows: range, device: torch.device) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        for batch in OrderedBatches(self.targets, self.batch_size, rows):
            states = block_states(self.model, _on(device, batch), self.boundaries)
            yield batch["target_row"].numpy(), dict.fromkeys(self.signals, states)


class Rankings:
    """The best items and their scores, without those met before: for every training target, or for every user.

    At a training target the teacher has read nothing that came after it, and of what came before no more than its own training
    row holds. With `examples: sequence` the rows of a user are windows that share no target: one that begins inside a history
    begins with a single item before its first target, so that the teacher knows the first few of each such window by few items,
    unless `sequences.context` gives it more. With `examples: prefixes` of the teacher each target has the latest `max_length`
    items before it, and so it has of a teacher that writes (BIGRec), up to its own length of history. All that was met before
    is left out of the list, whether it was read or not; the target itself may be in it. For a user the teacher has read the
    latest `max_length` of his training history, and all of it is left out.
    """

    names = ("ranking-items", "ranking-scores")

    def __init__(self, model: Recommender, config: RecordStage, teacher: Stage, dataset: Dataset) -> None:
        self.model, self.batch_size, self.k, self.dataset = model, config.batch_size, config.k, dataset
        self.tables = model.tables()
        self.histories = Histories(dataset, teacher.config.sequences.max_length)
        self.targets: TrainingRows | None = None
        self.per_batch = self.batch_size
        if config.per == "user":
            self.rows, self.split = dataset.n_users, dataset.fingerprint
        else:
            self.targets = TrainingRows(dataset, teacher.config.sequences)
            self.rows, self.split = self.targets.targets, self.targets.fingerprint
            if not isinstance(model, GroundedRecommender):  # which is asked about one target at a time
                self.per_batch *= -(-self.rows // len(self.targets))
        shape = (config.k,)
        self.signals = dict(zip(self.names, ((shape, "int32"), (shape, "float32")), strict=True))

    def answers(self, rows: range, device: torch.device) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        if self.targets is None:
            asked = self._per_user(rows, device)
        else:
            grounded = isinstance(self.model, GroundedRecommender)
            asked = self._per_history(rows, device) if grounded else self._per_target(rows, device)
        for number, (items, scores) in asked:
            scores = torch.where(items > 0, scores, torch.finfo(torch.float32).min)  # a record holds finite numbers
            yield number, dict(zip(self.names, (items.int(), scores.float()), strict=True))

    def _per_target(self, rows: range, device: torch.device) -> Iterator[tuple[np.ndarray, tuple[Tensor, Tensor]]]:
        assert self.targets is not None
        catalogue = Catalogue(self.model.item_table())  # type: ignore[arg-type]
        for batch in OrderedBatches(self.targets, self.batch_size, rows):
            number = batch["target_row"].numpy()
            user, at = self.targets.places(number)
            with torch.inference_mode():
                vectors = self.model(_on(device, batch)).user  # [T, d]
            met = np.cumsum(at - self.dataset.offsets[user])
            for part in np.split(np.arange(len(number)), np.flatnonzero(np.diff(met // MET)) + 1):
                target = self.dataset.items[at[part]].astype(np.int64)
                seen = _on(device, seen_before(self.dataset, user[part], at[part], target))
                with torch.inference_mode():
                    lists = top_items(vectors[part], catalogue, self.k, seen["seen_row"], seen["seen_item"])
                yield number[part], lists

    def _per_history(self, rows: range, device: torch.device) -> Iterator[tuple[np.ndarray, tuple[Tensor, Tensor]]]:
        """The history before each target by itself: what is said after it cannot be read off at every position of a row."""
        assert self.targets is not None
        for start in range(rows.start, rows.stop, self.batch_size):
            number = np.arange(start, min(start + self.batch_size, rows.stop))
            user, at = self.targets.places(number)
            target = self.dataset.items[at].astype(np.int64)
            first = np.maximum(at - self.histories.length, self.dataset.offsets[user])
            items = torch.from_numpy(windows(self.dataset.items, first, at))
            batch = {"items": items, "mask": items > 0, "target": torch.from_numpy(target)}
            batch |= seen_before(self.dataset, user, at, target)
            with torch.inference_mode():
                yield number, self.model.top_items(_on(device, batch), self.k, self.tables)

    def _per_user(self, rows: range, device: torch.device) -> Iterator[tuple[np.ndarray, tuple[Tensor, Tensor]]]:
        for start in range(rows.start, rows.stop, self.batch_size):
            user = torch.arange(start, min(start + self.batch_size, rows.stop))
            items, mask = self.histories.latest(user)
            batch = {"user": user, "items": items, "mask": mask, "target": torch.zeros_like(user)}
            batch |= self.histories.seen(user)
            with torch.inference_mode():
                yield user.numpy(), self.model.top_items(_on(device, batch), self.k, self.tables)


QUESTIONS: dict[str, Any] = {"block_states": BlockStates, "ranking": Rankings}


def check(stage: Stage) -> None:
    """Check what the data decide, once they are prepared.

    Raises:
        UserError: lists are asked for that are longer than the catalogue.
    """
    if stage.config.record == "ranking" and stage.config.k > (n_items := load_dataset(stage).n_items):
        raise UserError(
            f"stages.{stage.name}.k is {stage.config.k}, but the catalogue has {n_items} items. Choose {n_items} or less."
        )


def run(stage: Stage) -> dict[str, Any]:
    """Record the teacher, shard by shard, several processes each its own; whole shards of an interrupted pass are kept."""
    config: RecordStage = stage.config
    teacher = stage.need(config.of)
    dataset = load_dataset(stage)
    mine = Processes.here().of(stage)
    device = device_of(teacher.config.trainer, mine.local_rank)
    model = load_model(teacher, dataset).to(device)
    if isinstance(model, GroundedRecommender):  # a shard may take it hours
        model.keep(stage.folder / SAID.format(mine.rank), sorted(stage.folder.glob(SAID.format("*"))))
    question: Question = QUESTIONS[config.record](model, config, teacher, dataset)
    if config.online:
        return {"rows": question.rows, "bytes": 0, "online": True}
    writers: dict[str, SignalWriter] = {}
    with mine.first_goes_first():
        per_shard = _shard_rows(stage, question, mine.world)
        for name, (shape, dtype) in question.signals.items():
            spec = SignalSpec(name, question.rows, shape, dtype, teacher.fingerprint, question.split, per_shard)
            writers[name] = SignalWriter(stage.folder / name, spec)
    started = time.perf_counter()
    recorded = sum(map(len, _missing(writers, Processes())))
    missing = _missing(writers, mine)
    for rows in missing:
        if isinstance(model, GroundedRecommender):  # batches of a shard are then the same whichever were filled before
            model.memory.clear()
        with ExitStack() as stack:
            shards = {name: stack.enter_context(writer.shard(rows)) for name, writer in writers.items()}
            for number, answers in question.answers(rows, device):
                inside = (number >= rows.start) & (number < rows.stop)
                for name, values in answers.items():
                    shards[name].write(number[inside], values.cpu()[inside])
                if not all(shard.written.all() for shard in shards.values()):  # a whole one is kept first
                    stop_if_asked()
        log.info("%-24s %d of %d rows", stage.label, rows.stop, question.rows)
        stop_if_asked()
    if not mine.first:
        return {}
    mine.wait(stage.folder, lambda: not _missing(writers, Processes()), "the shards of the others")
    for writer in writers.values():
        writer.finish()
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for writer in writers.values() for path in writer.folder.glob("*.npy"))
    summary = {"rows": question.rows, "bytes": size, "seconds": seconds}
    if recorded:  # the last start may have found all shards whole
        summary["rows_per_second"] = recorded / max(seconds, 1e-9)
    work = model.kept(stage.folder.glob(SAID.format("*"))) if isinstance(model, GroundedRecommender) else Work()
    if not work.asked:
        return summary
    work.warn(stage.config.of)
    return summary | work.summary


def _missing(writers: dict[str, SignalWriter], mine: Processes) -> list[range]:
    """The rows of the shards that are still to be filled, by these processes' number."""
    found = {rows.start: rows for writer in writers.values() for rows in writer.missing(mine.rank, mine.world)}
    return [rows for _, rows in sorted(found.items())]


def _shard_rows(stage: Stage, question: Question, world: int) -> int:
    """Rows of a shard of every signal."""
    sizes: list[int | None] = [SHARD_BATCHES * question.per_batch]
    sizes += [SignalSpec(name, question.rows, *signal, "", "").rows_per_shard for name, signal in question.signals.items()]
    begun, said = stage.folder / next(iter(question.signals)), stage.config.signals.shard_rows
    return shard_rows(begun, question.rows, min(filter(None, sizes)), world, said)


def block_states(model: SequentialRecommender, batch: Batch, boundaries: list[int]) -> Tensor:
    """Hidden states at the block ends for every target of the batch: `[T, blocks, D]`, without gradient."""
    with torch.inference_mode():
        hidden = model(batch, with_hidden=True).hidden
    assert hidden is not None
    return torch.stack([hidden[layer] for layer in boundaries], 1)


def _on(device: torch.device, batch: Batch) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}


def _sequential(model: Recommender, config: RecordStage) -> SequentialRecommender:
    if not isinstance(model, SequentialRecommender):
        raise UserError(f"Stage '{config.of}' is no sequential model: it has no hidden states to record. Record another one.")
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
