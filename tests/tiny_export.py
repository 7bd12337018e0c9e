"""A tiny run on disk, prepared and 'trained' (with random weights), for the tests of what comes after training."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lit_llmers import export
from lit_llmers.backbones import CollaborativeBackbone
from lit_llmers.building import find
from lit_llmers.conf.schema import LossConfig, SequenceConfig
from lit_llmers.conf.stages import ExportStage, FitStage
from lit_llmers.data import DataConfig
from lit_llmers.data.dataset import TEST, TRAIN, VALID, Dataset
from lit_llmers.files import write_json
from lit_llmers.models import build_model
from lit_llmers.stages import TABLE, Run, Stage, describe

N_ITEMS, MAX_LENGTH, DIM = 30, 9, 8
FIRST = ["Toy Story (1995)", "Toy Story 2 (1999)", "Matrix, The (1999)", "Aladdin (1992)", "Salt &amp; Pepper; A Tale"]
TITLES = [*FIRST, *(f"Film number {index}" for index in range(len(FIRST) + 1, N_ITEMS + 1))]


def dataset() -> Dataset:
    """Twenty users with histories of 2 to 21 items before the last."""
    random = np.random.default_rng(0)
    lengths = np.arange(3, 23)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    split = np.full(offsets[-1], TRAIN, np.uint8)
    split[offsets[1:] - 1], split[offsets[1:] - 2] = TEST, VALID
    catalogue = pd.DataFrame(
        {"item_id": [f"i{index}" for index in range(1, N_ITEMS + 1)], "title": TITLES, "categories": "Film", "text": ""}
    )
    return Dataset(
        items=random.integers(1, N_ITEMS + 1, offsets[-1]).astype(np.int32),
        offsets=offsets.astype(np.int64),
        split=split,
        users=np.array([f"u{user}" for user in range(len(lengths))], object),
        catalogue=catalogue,
        info={"name": "tiny", "generated": True, "split": "leave-one-out"},
    )


def export_stage(folder: Path, fit: str, model: dict, formats: list[str], mask_history: bool = True) -> Stage:
    """An export stage, not run yet, whose needs are done: the data, an item table and a model with random weights."""
    run = Run(folder, "tiny", "default", {})
    data = Stage("prepare", "prepare", DataConfig(), 0, [], run)
    dataset().save(data.folder)
    vectors = Stage("table", "fit", FitStage("sasrec"), 0, [data], run)
    vectors.folder.mkdir(parents=True)
    np.save(vectors.folder / TABLE, np.random.default_rng(1).normal(size=(N_ITEMS + 1, DIM)).astype(np.float32))

    pairwise = issubclass(find("backbones", fit), CollaborativeBackbone)
    config = FitStage(
        fit,
        model,
        LossConfig(kind="bpr", negatives=1) if pairwise else LossConfig(),
        items=["table"] if fit == "llm_decoder" else [],
        sequences=SequenceConfig(max_length=MAX_LENGTH),
        mask_history=mask_history,
    )
    student = Stage("student", "fit", config, 3, [data, vectors], run, repeated=True)
    student.folder.mkdir()
    torch.manual_seed(0)
    built = build_model(student, dataset())
    with torch.no_grad():
        for parameter in built.parameters():  # no weight is as it was made, LoRA's zeros neither
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        if fit != "llm_decoder" and (table := built.item_table()) is not None:
            table[0] = 0
    checkpoint = {"state_dict": built.state_dict() | {"distillation.features.projector.weight": torch.ones(2, 2)}}
    built.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, student.folder / "best.ckpt")
    summary = {"parameters": {"total": 1, "trainable": 1}, "best": {"epoch": 0, "val/NDCG@10": 0.1}}
    write_json(student.folder / "DONE", {"seconds": 0.0, "summary": summary})
    stage = Stage("export", "export", ExportStage(formats, "student"), 0, [data, student], run)
    stage.folder.mkdir()
    return stage


def finish(stage: Stage) -> dict:
    """Run the stage and mark it and its run as `lit_llmers.running` and `lit_llmers.fit` do."""
    summary = export.run(stage)
    write_json(stage.folder / "DONE", {"seconds": 0.0, "summary": summary})
    record = {"command": "python -m lit_llmers.fit recipe=tiny seed=1", "stages": describe([*stage.needs, stage])}
    (stage.run.folder / "run.json").write_text(json.dumps(record))
    return summary
