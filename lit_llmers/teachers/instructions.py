"""What a language model is tuned on: prompts that tell of a history, and the title of the item after it.

Only training items stand in the prompts and responses that are trained on. What is validated on is held-out validation items,
after training items.
"""

import logging
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch

from lit_llmers.conf.instruction import TuneStage
from lit_llmers.conf.schema import SequenceConfig
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.loader import Batch, EvaluationBatches, TrainingBatches
from lit_llmers.data.sequences import EvaluationRows, TrainingRows
from lit_llmers.errors import UserError
from lit_llmers.stages import Stage
from lit_llmers.teachers.wording import Wording, pad_left

IGNORED = -100  # label of a token that is not learnt

log = logging.getLogger(__name__)


class InstructionRows:
    """Histories and the items after them, whose titles are to be said.

    Args:
        wording: says how long texts are, and which items have a title.
        user, at: `[R]`, whose each item is and where it stands in `dataset.items`.

    Attributes:
        start: `[R]`; the prompt tells of `items[start:at]`.
        lengths: `[R]` tokens of prompt and response, about.
    """

    def __init__(self, dataset: Dataset, wording: Wording, user: np.ndarray, at: np.ndarray) -> None:
        self.dataset, self.wording, self.user, self.at = dataset, wording, user, at
        self.start = np.maximum(at - wording.history, dataset.offsets[user])
        before = np.concatenate([[0], np.cumsum(wording.sizes[dataset.items])])
        self.lengths = before[at + 1] - before[self.start]

    @classmethod
    def of_training(
        cls, dataset: Dataset, wording: Wording, sequences: SequenceConfig, samples: int | None, seed: int
    ) -> "InstructionRows":
        """Training targets that have a title, after something that a prompt can tell of; `samples` of them, drawn at random."""
        rows = TrainingRows(dataset, sequences)
        user, at = rows.places(np.arange(rows.targets))
        titled, told = (np.array([bool(text) for text in texts]) for texts in (wording.titles, wording.told))
        before = np.concatenate([[0], np.cumsum(told[dataset.items])])
        something = before[at] > before[np.maximum(at - wording.history, dataset.offsets[user])]
        if not something.all():
            log.warning(
                "%d of %d training targets come after items of which no text says anything, and are left out: their prompts "
                "would be empty. When it ranks, the model answers such prompts with what it says to anybody",
                np.count_nonzero(~something),
                len(at),
            )
        named = titled[dataset.items[at]]
        if not named.all():
            log.warning(
                "%d of %d training targets have no title to be said, and are left out", np.count_nonzero(~named), len(at)
            )
        chosen = np.flatnonzero(named & something)
        if not len(chosen):
            raise UserError(
                "No training target has a title and comes after an item with a text, so there is nothing to tune on. Look at "
                "data.columns.title, and the tune stage's fields."
            )
        if samples is not None and samples < len(chosen):
            chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:samples])
        return cls(dataset, wording, user[chosen], at[chosen])

    @classmethod
    def of_validation(cls, dataset: Dataset, wording: Wording, users: int | None) -> "InstructionRows":
        """Validation items that have a title."""
        rows = EvaluationRows(dataset, "valid", wording.history, users)
        titled = np.array([bool(wording.titles[item]) for item in rows.target], dtype=bool)
        if not titled.any():
            raise UserError("No validation item has a title, so there is nothing to select by. Look at data.columns.title.")
        return cls(dataset, wording, rows.user[titled], rows.at[titled])

    def __len__(self) -> int:
        return len(self.user)

    def example(self, row: int) -> tuple[list[int], int]:
        """The items of the prompt, oldest first, and the item to be said."""
        return self.dataset.items[self.start[row] : self.at[row]].tolist(), int(self.dataset.items[self.at[row]])


class InstructionBatches(TrainingBatches):
    """Shuffled batches of prompts with their responses, of like lengths; see `TrainingBatches` for how they go on.

    A batch has `row` `[B]`, `tokens` `[B, L]` and `mask` `[B, L]`, left-padded, and `labels` `[B, R]` of the last R tokens.
    """

    rows: Any

    def __init__(self, rows: InstructionRows, on_prompt: bool, *settings: int, **ranks: int) -> None:
        super().__init__(rows, *settings, **ranks)  # type: ignore[arg-type]
        self.on_prompt = on_prompt

    def collate(self, index: np.ndarray) -> Batch:
        wording = self.rows.wording
        histories, targets = zip(*(self.rows.example(row) for row in index), strict=True)
        prompts, responses = wording.prompts(histories), [wording.response(item) for item in targets]
        tokens, mask = pad_left([[*prompt, *said] for prompt, said in zip(prompts, responses, strict=True)], wording.end)
        if self.on_prompt:  # all but the first token, before which nothing stands
            after_first = mask[:, 1:] & mask[:, :-1]
            labels = tokens[:, 1:].masked_fill(~after_first, IGNORED)
        else:
            labels = pad_left(responses, IGNORED)[0]
        return {"row": torch.from_numpy(index), "tokens": tokens, "mask": mask, "labels": labels}


class HeldOutBatches:
    """Each held-out row once, the longest together; batches are those of `InstructionBatches`."""

    def __init__(self, rows: InstructionRows, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.source = InstructionBatches(rows, False, batch_size, 0, rank=rank, world=world)
        order = np.argsort(rows.lengths, kind="stable")
        self.batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return (self.source.own(index) for index in self.batches)


class InstructionData(L.LightningDataModule):
    """Training batches, and what the stage validates on."""

    def __init__(self, stage: Stage, dataset: Dataset, wording: Wording) -> None:
        super().__init__()
        config: TuneStage = stage.config
        self.config, self.dataset, self.wording, self.seed = config, dataset, wording, stage.seed
        self.rows = InstructionRows.of_training(dataset, wording, config.sequences, config.samples, stage.seed)

    def _ranks(self) -> dict[str, Any]:
        return {"rank": self.trainer.global_rank, "world": self.trainer.world_size} if self.trainer else {}

    def train_dataloader(self) -> InstructionBatches:
        return InstructionBatches(self.rows, self.config.on_prompt, self.config.trainer.batch_size, self.seed, **self._ranks())

    def val_dataloader(self) -> Any:
        config = self.config
        if config.validate == "ranking":
            rows = EvaluationRows(self.dataset, "valid", self.wording.history, config.validation_users)
            return EvaluationBatches(rows, 256, config.mask_history, **self._ranks())
        held_out = InstructionRows.of_validation(self.dataset, self.wording, config.validation_users)
        return HeldOutBatches(held_out, config.trainer.batch_size, **self._ranks())
