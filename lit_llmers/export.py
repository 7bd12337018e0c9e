"""The `export` stage: a trained model as a folder that serves by itself (see `lit_llmers.serving`).

`model.safetensors` holds the weights as they were trained, adapters merged into their base. `model.onnx` is the whole
model in float32, from histories to the scores of the whole catalogue: a server needs nothing beside it, the item table
is in it once and serves both ends, and every runtime can take the best of a row. Both are checked against the
trained model on real users before they are kept, and `README.md` says how to ask them. A collaborative model is exported
as its two final tables, and its users and what they have met as `users.parquet`.
"""

if __name__ == "__main__":
    from lit_llmers.stages import no_command

    no_command("export")  # before anything that takes time is imported

import json
import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_llmers.backbones import CollaborativeBackbone
from lit_llmers.backbones.llm_decoder import LLMDecoder
from lit_llmers.building import find
from lit_llmers.conf.stages import ExportStage
from lit_llmers.data.dataset import Dataset
from lit_llmers.data.loader import EvaluationBatches
from lit_llmers.data.sequences import EvaluationRows
from lit_llmers.errors import UserError
from lit_llmers.files import atomic_write, write_json
from lit_llmers.models import load_dataset, load_model
from lit_llmers.serving import FORMAT, OnnxScorer, inputs_of, load_exported, score_catalogue
from lit_llmers.serving.exported import CONFIG, GRAPH, GUIDE, ITEMS, USERS, WEIGHTS
from lit_llmers.serving.guide import explain, readme
from lit_llmers.serving.onnx_graph import save_onnx, trace
from lit_llmers.serving.served import FinalTables, innermost, rebuild, served, weights_of
from lit_llmers.stages import TABLE, Stage
from lit_llmers.students.recommender import Recommender
from lit_llmers.teachers.base import BaseConfig

__all__ = ["load_exported", "run"]

TOLERANCE = 1e-3  # of a score, relative to the largest: between ONNX and PyTorch
REREAD_TOLERANCE = 1e-6  # the same between a model and itself, read back
# the same with adapters merged into a base of that precision: by 32 layers, adapted throughout, 1e-6, 0.002 and 0.02
MERGE_TOLERANCE = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
CHECKED = 32  # real users, from the shortest history to the longest, that both files are checked on

log = logging.getLogger(__name__)


def run(stage: Stage) -> dict[str, Any]:
    """Write the export into the stage's folder; `config.json`, without which it is none, comes last.

    Raises:
        UserError: the merged model, or a file, that does not score as the trained model does.
    """
    config: ExportStage = stage.config
    dataset, fitted = load_dataset(stage), stage.need(config.of)
    model = load_model(fitted, dataset)
    max_length = fitted.config.sequences.max_length
    asked = real_users(dataset) if "user" in served(model, max_length).inputs else real_histories(dataset, max_length)
    difference: dict[str, float] = {}
    make_portable(model)
    before = scores_of(model, max_length, asked)
    if change := make_standalone(model):
        difference[change], relative = compare(scores_of(model, max_length, asked), before)
        if change == "lora_merge":
            _check_merge(difference[change], relative, str(innermost(model.backbone).base.dtype).removeprefix("torch."))
    description = {
        **{"stage": stage.name, "verb": stage.verb, "seed": stage.seed, "settings": asdict(config)},
        **describe(model, fitted, dataset),
    }
    write_catalogue(dataset, stage.folder)
    if "user" in description["inputs"]:
        write_users(dataset, stage.folder)
    if "safetensors" in config.export:
        difference["safetensors"] = write_safetensors(model, stage.folder, description, asked)
    if "onnx" in config.export:
        difference["onnx"] = write_onnx(model, stage.folder, description, asked)
    with atomic_write(stage.folder / GUIDE) as temporary:
        temporary.write_text(readme(description, stage.folder))
    write_json(stage.folder / CONFIG, description)
    names = [CONFIG, GUIDE, ITEMS, USERS, WEIGHTS, GRAPH, f"{GRAPH}.data"]
    size = {name: path.stat().st_size for name in names if (path := stage.folder / name).is_file()}
    for name, value in difference.items():
        log.info("%-24s %s: largest difference of a score %.1e", stage.label, name, value)
    return {"files": list(size), "bytes": size, "max_difference": difference}


# ---- what is exported ------------------------------------------------------------------------------------------------


def make_portable(model: Recommender) -> None:
    """Give an LLM decoder, in place, an attention that runs anywhere: a training GPU's kernels cannot score here."""
    backbone = innermost(model.backbone)
    if isinstance(backbone, LLMDecoder) and backbone.base.config._attn_implementation not in ("eager", "sdpa"):
        backbone.base.set_attn_implementation("sdpa")


def make_standalone(model: Recommender) -> str:
    """Free the model, in place, from what serving has not.

    A collaborative model becomes its final tables, without the graph they come from. An LLM decoder loses its adapters,
    which are merged into the base and rounded to its precision.

    Returns:
        the change that scores are to be compared across, `tables` or `lora_merge`; empty if there is none.
    """
    if isinstance(model.backbone, CollaborativeBackbone):
        with torch.no_grad():
            model.backbone = FinalTables(*model.backbone())
        return "tables"
    backbone = innermost(model.backbone)
    return "lora_merge" if isinstance(backbone, LLMDecoder) and _merge_adapters(backbone) else ""


def _merge_adapters(backbone: LLMDecoder) -> bool:
    """Whether there were adapters to merge."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in backbone.base.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(backbone.base.get_submodule(parent), child, module.get_base_layer())
    return bool(adapted)


def _check_merge(difference: float, relative: float, dtype: str) -> None:
    """Refuse a merge that moves scores by more than rounding to the base's `dtype` does."""
    if not relative <= MERGE_TOLERANCE[dtype]:
        raise UserError(
            f"With its adapters merged into the base, in {dtype}, the model scores up to {difference:.3g} away from what was "
            f"trained, {relative:.3g} of the largest score and more than {MERGE_TOLERANCE[dtype]}; it was not exported. Train "
            "it with teacher.dtype=float32 or without adapters, teacher.lora=null, or stop before the export: stage=evaluate."
        )


def describe(model: Recommender, fitted: Stage, dataset: Dataset) -> dict[str, Any]:
    """All that `config.json` says of the model: how to build it, and where it comes from."""
    backbone = innermost(model.backbone)
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
        "backbone": {"name": fitted.config.fit, "arguments": arguments, "dim": backbone.dim},
        "fusion": [_fusion(name, arguments, fitted) for name, arguments in fitted.config.fusions],
        "inputs": list(served(model, fitted.config.sequences.max_length).inputs),
        "n_items": dataset.n_items,
        "n_users": dataset.n_users,
        "max_length": fitted.config.sequences.max_length,
        "mask_history": fitted.config.mask_history,
        "dim": model.backbone.dim,
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


def _fusion(name: str, arguments: dict[str, Any], fitted: Stage) -> dict[str, Any]:
    """How to build a fusion again: its own arguments, and how wide the text was that it read, by argument."""
    sources = find("fusion", name).sources
    kept = {parameter: key for parameter, (key, kind) in sources.items() if kind == "items" and arguments.get(key) is not None}
    width = {parameter: _width(fitted.need(arguments[key])) for parameter, key in kept.items()}
    dropped = {key for key, kind in sources.values() if kind != "items"}  # a trained model gave it weights at the start
    return {"name": name, "arguments": {key: arguments[key] for key in arguments if key not in dropped}, "text": width}


def _width(stage: Stage) -> int:
    return int(np.load(stage.folder / TABLE, mmap_mode="r", allow_pickle=False).shape[1])


def write_catalogue(dataset: Dataset, folder: Path) -> None:
    """Write `items.parquet`: `index` 1..n, `item_id`, `title`, `categories`."""
    catalogue = dataset.catalogue[["item_id", "title", "categories"]]
    catalogue.insert(0, "index", np.arange(1, dataset.n_items + 1))
    with atomic_write(folder / ITEMS) as temporary:
        catalogue.to_parquet(temporary, index=False)


def write_users(dataset: Dataset, folder: Path) -> None:
    """Write `users.parquet`: `user_id` of the rows 0..U-1, and `items`, all they have met, held-out parts too, oldest first."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    met = pa.LargeListArray.from_arrays(np.asarray(dataset.offsets), np.asarray(dataset.items))
    with atomic_write(folder / USERS) as temporary:
        write_table(pa.table({"user_id": pa.array(dataset.users, pa.string()), "items": met}), temporary)


# ---- checks on real users --------------------------------------------------------------------------------------------


def real_histories(dataset: Dataset, max_length: int) -> list[np.ndarray]:
    """Left-padded batches `[B, L]` int64: the shortest history, the longest, all together, and all padded further.

    The last one is longer than what is read: the longest over and over.
    """
    rows = EvaluationRows(dataset, "test", max_length)
    order = np.argsort(rows.lengths, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, CHECKED).astype(int))]
    batches = EvaluationBatches(rows, CHECKED, mask_history=False)
    made = [batches.collate(index)["items"].numpy() for index in (chosen[:1], chosen[-1:], chosen)]
    padded = np.pad(made[-1], ((0, 0), (max_length - made[-1].shape[1], 0)))
    return [*made, padded, np.resize(made[1], (1, 2 * max_length))]


def real_users(dataset: Dataset) -> list[np.ndarray]:
    """Batches `[B]` int64 of rows of the user table: the user with the shortest history, the longest, all together."""
    order = np.argsort(np.diff(dataset.offsets), kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, CHECKED).astype(int))]
    return [chosen[:1], chosen[-1:], chosen]


def scores_of(model: Recommender, max_length: int, asked: list[np.ndarray]) -> list[np.ndarray]:
    """Scores `[B, n+1]` of the trained model for each batch."""
    with torch.inference_mode():
        tensors = [[torch.from_numpy(value) for value in inputs_of(batch).values()] for batch in asked]
        return [score_catalogue(model, max_length, *inputs).float().numpy() for inputs in tensors]


def compare(got: list[np.ndarray], expected: list[np.ndarray]) -> tuple[float, float]:
    """The largest difference of a score, absolute and relative to the largest score. NaN counts as infinite."""
    pairs = list(zip(got, expected, strict=True))
    largest = max(float(np.abs(a[:, 1:] - b[:, 1:]).max()) for a, b in pairs)
    if not all(np.isneginf(a[:, 0]).all() and np.isfinite(a[:, 1:]).all() for a, _ in pairs):
        largest = float("inf")
    scale = max(float(np.abs(b[:, 1:]).max()) for _, b in pairs)
    return largest, largest / (scale or 1.0)  # all scores are 0 where no neighbour is known


# ---- the two files ---------------------------------------------------------------------------------------------------


def write_safetensors(model: Recommender, folder: Path, description: dict[str, Any], asked: list[np.ndarray]) -> float:
    """Write the weights and read them back into a new model.

    Returns:
        the largest difference between its scores and the model's, 0 as a rule.

    Raises:
        UserError: any bit of a weight differs, or a score by more than `REREAD_TOLERANCE`; the file is not kept.
    """
    from safetensors.torch import load_file, save_file

    length = description["max_length"]
    with atomic_write(folder / WEIGHTS) as temporary:
        save_file(weights_of(model), temporary)
        temporary.chmod((folder / ITEMS).stat().st_mode)  # safetensors would keep it from other users
        again = rebuild(json.loads(json.dumps(description)), load_file(temporary))
        read, written = weights_of(again), weights_of(model)
        same = read.keys() == written.keys() and all(torch.equal(read[name], written[name]) for name in read)
        difference, relative = compare(scores_of(again, length, asked), scores_of(model, length, asked))
        if not (same and relative <= REREAD_TOLERANCE):
            raise UserError(
                f"{WEIGHTS}, read back, is not the trained model: its scores differ by up to {difference:.3g}; it was "
                "not kept. Give the same command again; if it stays so, export ONNX alone: stages.export.export=[onnx]."
            )
    return difference


def write_onnx(model: Recommender, folder: Path, description: dict[str, Any], asked: list[np.ndarray]) -> float:
    """Write the model as one ONNX graph, in float32; the model itself is changed into what can be exported.

    Inputs `items [batch, length]` int64, left-padded with 0, of which the latest `max_length` are read, and `mask
    [batch, length]` bool, or `user [batch]` int64, 0..U-1; output `scores [batch, n+1]` float32, `-inf` for item 0.

    Returns:
        the largest difference between its scores and PyTorch's in float32.

    Raises:
        UserError: a difference above `TOLERANCE`; the file is not kept.
    """
    model.float()
    max_length = description["max_length"]
    expected = scores_of(model, max_length, asked)

    def check(path: Path) -> float:
        scorer = OnnxScorer(path)
        difference, relative = compare([scorer(batch) for batch in asked], expected)
        if not relative <= TOLERANCE:
            raise UserError(
                f"{GRAPH} scores up to {difference:.3g} away from PyTorch, {relative:.3g} of the largest score and "
                f"more than {TOLERANCE}; it was not kept. Export without it: stages.export.export=[safetensors]."
            )
        return difference

    program = trace(model, max_length)
    explain(program.model, description)
    return save_onnx(program, folder, check)
