"""The `export` stage: a trained model as a folder that serves by itself (see `lit_llmers.serving`).

`model.safetensors` holds the weights as they were trained, adapters merged into their base. `model.onnx` is the whole
model in float32, from histories to the scores of the whole catalogue: a server needs nothing beside it, the item table
is in it once and serves both ends, and every runtime can take the best of a row. Both are checked against the
trained model on real histories before they are kept.
"""

import json
import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_llmers.backbones import Backbone
from lit_llmers.backbones.llm_decoder import LLMDecoder
from lit_llmers.conf.schema import ExportStage
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.loader import EvaluationBatches
from lit_llmers.data.sequences import EvaluationRows
from lit_llmers.errors import UserError
from lit_llmers.files import atomic_write, write_json
from lit_llmers.models import load_dataset, load_model
from lit_llmers.onnx_graph import save_onnx, trace
from lit_llmers.serving import (
    CONFIG,
    FORMAT,
    GRAPH,
    ITEMS,
    WEIGHTS,
    OnnxScorer,
    load_exported,
    rebuild,
    score_catalogue,
)
from lit_llmers.stages import Stage
from lit_llmers.students.sequential import SequentialRecommender
from lit_llmers.teachers.base import BaseConfig

__all__ = ["load_exported", "run"]

TOLERANCE = 1e-3  # of a score, relative to the largest: between ONNX and PyTorch
REREAD_TOLERANCE = 1e-6  # the same between a model and itself, read back
HISTORIES = 32  # real ones, from the shortest to the longest, that both files are checked on

log = logging.getLogger(__name__)


def run(stage: Stage) -> dict[str, Any]:
    """Write the export into the stage's folder; `config.json`, without which it is none, comes last.

    Raises:
        UserError: a file that does not score as the trained model does.
    """
    config: ExportStage = stage.config
    dataset, fitted = load_dataset(stage), stage.need(config.of)
    model = load_model(fitted, dataset)
    histories = real_histories(dataset, fitted.config.sequences.max_length)
    difference: dict[str, float] = {}
    before = scores_of(model, histories)
    if make_standalone(model.backbone):
        difference["lora_merge"], _ = compare(scores_of(model, histories), before)
    description = {
        **{"stage": stage.name, "verb": stage.verb, "seed": stage.seed, "settings": asdict(config)},
        **describe(model, fitted, dataset),
    }
    with atomic_write(stage.folder / ITEMS) as temporary:
        catalogue = dataset.catalogue[["item_id", "title", "categories"]]
        catalogue.insert(0, "index", np.arange(1, dataset.n_items + 1))
        catalogue.to_parquet(temporary, index=False)
    if "safetensors" in config.export:
        difference["safetensors"] = write_safetensors(model, stage.folder, description, histories)
    if "onnx" in config.export:
        difference["onnx"] = write_onnx(model, stage.folder, fitted.config.sequences.max_length, histories)
    write_json(stage.folder / CONFIG, description)
    names = [CONFIG, ITEMS, WEIGHTS, GRAPH, f"{GRAPH}.data"]
    size = {name: path.stat().st_size for name in names if (path := stage.folder / name).is_file()}
    for name, value in difference.items():
        log.info("%-24s %s: largest difference of a score %.1e", stage.label, name, value)
    return {"files": list(size), "bytes": size, "max_difference": difference}


# ---- what is exported ------------------------------------------------------------------------------------------------


def make_standalone(backbone: Backbone) -> bool:
    """Free an LLM decoder, in place, from what serving has not: adapters, and attention kernels of a training GPU.

    Returns:
        whether adapters were merged into the base, which rounds them to the base's precision.
    """
    if not isinstance(backbone, LLMDecoder):
        return False
    if backbone.base.config._attn_implementation not in ("eager", "sdpa"):
        backbone.base.set_attn_implementation("sdpa")
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in backbone.base.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(backbone.base.get_submodule(parent), child, module.get_base_layer())
    return bool(adapted)


def describe(model: SequentialRecommender, fitted: Stage, dataset: Dataset) -> dict[str, Any]:
    """All that `config.json` says of the model: how to build it, and where it comes from."""
    backbone = model.backbone
    arguments = dict(fitted.config.model)
    if isinstance(backbone, LLMDecoder):
        architecture = json.loads(backbone.base.config.to_json_string())
        # of its vocabulary only the prompt's vectors are left, and they are among the weights
        architecture |= {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        arguments["base"] = {
            "name": BaseConfig.of(arguments["base"]).name,
            "config": {key: value for key, value in architecture.items() if key not in ("dtype", "transformers_version")},
            "dtype": str(backbone.base.dtype).removeprefix("torch."),
            "attention": backbone.base.config._attn_implementation,
        }
    summary = fitted.summary
    return {
        "format": FORMAT,
        "backbone": {"name": fitted.config.fit, "arguments": arguments},
        "n_items": dataset.n_items,
        "max_length": fitted.config.sequences.max_length,
        "dim": model.item_table().shape[1],
        "parameters": summary["parameters"],
        "trained": {
            "recipe": fitted.run.recipe,
            "run": fitted.run.name,
            "stage": fitted.name,
            "seed": fitted.seed,
            "fingerprint": fitted.fingerprint,
            "best": summary["best"],
        },
        "data": {key: dataset.info.get(key) for key in ("name", "generated")} | {"fingerprint": dataset.fingerprint},
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def weights_of(backbone: Backbone) -> dict[str, Tensor]:
    """The backbone's weights, and what it holds itself beside them, such as a frozen item table."""
    held = {name: value for name, value in backbone.named_buffers(recurse=False) if value.numel()}
    return {name: value.detach().cpu().contiguous() for name, value in (held | backbone.state_dict()).items()}


# ---- checks on real histories ----------------------------------------------------------------------------------------


def real_histories(dataset: Dataset, max_length: int) -> list[np.ndarray]:
    """Left-padded batches `[B, L]` int64: the shortest history, the longest, all together, and all padded further."""
    rows = EvaluationRows(dataset, "test", max_length)
    order = np.argsort(rows.lengths, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, HISTORIES).astype(int))]
    batches = EvaluationBatches(rows, HISTORIES, mask_history=False)
    made = [batches.collate(index)["items"].numpy() for index in (chosen[:1], chosen[-1:], chosen)]
    return [*made, np.pad(made[-1], ((0, 0), (max_length - made[-1].shape[1], 0)))]


def scores_of(model: SequentialRecommender, histories: list[np.ndarray]) -> list[np.ndarray]:
    """Scores `[B, n+1]` of the trained model for each batch."""
    with torch.inference_mode():
        return [score_catalogue(model, items, items > 0).float().numpy() for items in map(torch.from_numpy, histories)]


def compare(got: list[np.ndarray], expected: list[np.ndarray]) -> tuple[float, float]:
    """The largest difference of a score, absolute and relative to the largest score. NaN counts as infinite."""
    pairs = list(zip(got, expected, strict=True))
    largest = max(float(np.abs(a[:, 1:] - b[:, 1:]).max()) for a, b in pairs)
    if not all(np.isneginf(a[:, 0]).all() and np.isfinite(a[:, 1:]).all() for a, _ in pairs):
        largest = float("inf")
    return largest, largest / max(float(np.abs(b[:, 1:]).max()) for _, b in pairs)


# ---- the two files ---------------------------------------------------------------------------------------------------


def write_safetensors(
    model: SequentialRecommender, folder: Path, description: dict[str, Any], histories: list[np.ndarray]
) -> float:
    """Write the weights and read them back into a new model.

    Returns:
        the largest difference between its scores and the model's, 0 as a rule.

    Raises:
        UserError: any bit of a weight differs, or a score by more than `REREAD_TOLERANCE`; the file is not kept.
    """
    from safetensors.torch import load_file, save_file

    with atomic_write(folder / WEIGHTS) as temporary:
        save_file(weights_of(model.backbone), temporary)
        temporary.chmod((folder / ITEMS).stat().st_mode)  # safetensors would keep it from other users
        again = rebuild(json.loads(json.dumps(description)), load_file(temporary))
        read, written = weights_of(again.backbone), weights_of(model.backbone)
        same = read.keys() == written.keys() and all(torch.equal(read[name], written[name]) for name in read)
        difference, relative = compare(scores_of(again, histories), scores_of(model, histories))
        if not same or relative > REREAD_TOLERANCE:
            raise UserError(
                f"{WEIGHTS}, read back, is not the trained model: its scores differ by up to {difference:.3g}; it was "
                "not kept. Give the same command again; if it stays so, export ONNX alone: stages.export.export=[onnx]."
            )
    return difference


def write_onnx(model: SequentialRecommender, folder: Path, max_length: int, histories: list[np.ndarray]) -> float:
    """Write the model as one ONNX graph, in float32; the model itself is changed into what can be exported.

    Inputs `items [batch, length]` int64, left-padded with 0, `length` up to `max_length`, and `mask [batch, length]`
    bool; output `scores [batch, n+1]` float32, `-inf` for item 0.

    Returns:
        the largest difference between its scores and PyTorch's in float32.

    Raises:
        UserError: a difference above `TOLERANCE`; the file is not kept.
    """
    model.float()
    expected = scores_of(model, histories)

    def check(path: Path) -> float:
        scorer = OnnxScorer(path)
        difference, relative = compare([scorer(items) for items in histories], expected)
        if not relative <= TOLERANCE:
            raise UserError(
                f"{GRAPH} scores up to {difference:.3g} away from PyTorch, {relative:.3g} of the largest score and "
                f"more than {TOLERANCE}; it was not kept. Export without it: stages.export.export=[safetensors]."
            )
        return difference

    return save_onnx(trace(model, max_length), folder, check)
