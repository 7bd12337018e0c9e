"""Tuning a text encoder to tell items apart by whichever of their fields it is shown.

Source: LLMEmb, "LLMEmb: Large Language Model Can Be a Good Embedding Generator for Sequential Recommendation", AAAI 2025
(arXiv 2409.19925), supervised contrastive fine-tuning, as its official code (liuqidong07/LLMEmb) computes it: two views of
each item, each its fields in random order without the last `floor(drop * fields)`; the soft CLIP loss on pooled vectors that
are not normalised, with a trained temperature. What differs: a field is a column of the catalogue, there an attribute; and
fields are joined by full stops as everywhere here, so a view reads like the text that is encoded in the end.
"""

from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from lit_llmers.conf.encoding import EncodeStage
from lit_llmers.conf.typed import build
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.loader import Batch, TrainingBatches
from lit_llmers.files import writable
from lit_llmers.losses.alignment import soft_clip
from lit_llmers.processes import Processes
from lit_llmers.stages import Stage
from lit_llmers.teachers.base import checkpoint_activations, without_load_report
from lit_llmers.teachers.lora import LoraConfig, with_lora
from lit_llmers.text.learning import Learner, learn
from lit_llmers.text.transformer import TextEncoder

ADAPTER, MODEL = "adapter", "model"  # folders of the stage: PEFT's adapter, or with no LoRA the whole model


@dataclass(frozen=True)
class Fields:
    """The items that have a text.

    Attributes:
        cells: R items' fields that are not empty.
        drop: share of them that a view leaves out, rounded down.
    """

    cells: list[list[str]]
    drop: float

    @property
    def lengths(self) -> np.ndarray:
        """`[R]` characters: what batches are made by."""
        return np.array([sum(map(len, cells)) for cells in self.cells], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.cells)

    def view(self, row: int, random: np.random.Generator) -> str:
        """Some fields of an item, in random order."""
        cells = self.cells[row]
        kept = random.permutation(len(cells))[: len(cells) - int(self.drop * len(cells))]
        return ". ".join(cells[place] for place in kept)


class ViewBatches(TrainingBatches):
    """Shuffled batches of items of like length; see `TrainingBatches` for how they go on. Views are drawn anew each epoch.

    A batch has `row` `[B]`, and `tokens` and `mask` `[2 B, L]`: the first views, then the second ones.
    """

    rows: Any
    encoder: TextEncoder

    def collate(self, index: np.ndarray) -> Batch:
        random = np.random.default_rng([self.seed, self.epoch, self.position, 1])
        views = [self.rows.view(row, random) for _ in range(2) for row in index]
        tokens, mask = self.encoder.padded([ids or [0] for ids in self.encoder.tokens(views)])
        return {"row": torch.from_numpy(index), "tokens": tokens, "mask": mask}


class TwoViews(Learner):
    """The contrast of two views of a batch's items."""

    def __init__(self, stage: Stage, encoder: TextEncoder) -> None:
        super().__init__(stage)
        self.encoder, self.model = encoder, encoder.model
        self.temperature = nn.Parameter(torch.tensor(float(stage.config.contrast.temperature)))

    def loss(self, batch: Batch) -> Tensor:
        x, y = self.encoder.pooled(batch["tokens"], batch["mask"]).chunk(2)
        return soft_clip(x, y, temperature=self.temperature).mean()


def tune_by_contrast(stage: Stage, dataset: Dataset, encoder: TextEncoder) -> dict[str, Any]:
    """Tune the encoder in place, keep its adapter or its weights in the stage's folder, and say what it cost.

    Raises:
        UserError: a target of the adapters is not the name of a layer.
    """
    config: EncodeStage = stage.config
    assert config.contrast is not None
    L.seed_everything(stage.seed, verbose=False)
    columns = [dataset.catalogue[name].str.strip() for name in config.fields]
    cells = [[cell for cell in row if cell] for row in zip(*columns, strict=True)]
    rows = Fields([row for row in cells if row], config.contrast.drop)
    wrapped: Any = encoder.model.requires_grad_(config.contrast.lora is None)
    if config.contrast.gradient_checkpointing:
        checkpoint_activations(wrapped)
    if config.contrast.lora is not None:
        wrapped = with_lora(encoder.model, build(LoraConfig, config.contrast.lora, f"{stage.name}.contrast.lora"), task=None)
    encoder.model = wrapped
    learner = TwoViews(stage, encoder)
    batches = ViewBatches(rows, stage.config.trainer.batch_size, stage.seed)  # type: ignore[arg-type]
    batches.encoder = encoder
    throughput = learn(stage, learner, batches)
    trainable = sum(parameter.numel() for parameter in learner.parameters() if parameter.requires_grad)
    if Processes.here().of(stage).first:
        folder = stage.folder / (MODEL if config.contrast.lora is None else ADAPTER)
        with without_load_report(), writable(folder):
            wrapped.save_pretrained(folder)
            if config.contrast.lora is None:
                encoder.tokenizer.save_pretrained(folder)
    if config.contrast.lora is not None:
        encoder.model = wrapped.get_base_model()
    encoder.model.eval().requires_grad_(False)
    encoder.place()
    return {
        "trainable": trainable,
        "epochs": throughput.epochs,
        "temperature": learner.temperature.item(),
        "train_seconds": throughput.seconds,
        "trained_texts_per_second": 2 * throughput.rows / max(throughput.seconds, 1e-9),
    }
