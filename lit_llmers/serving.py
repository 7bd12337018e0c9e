"""An exported student at work, from its own folder alone: no run, no teacher, no data, and with ONNX no torch either.

An export is `config.json` (how to build the model, and where it comes from), `items.parquet` (the catalogue),
`model.safetensors` (the weights) and `model.onnx` (the whole model as one graph).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_llmers.errors import UserError
from lit_llmers.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from lit_llmers.students.sequential import SequentialRecommender

FORMAT = 1  # raised when a folder written before can no longer be read
CONFIG, ITEMS, WEIGHTS, GRAPH = "config.json", "items.parquet", "model.safetensors", "model.onnx"
_AGAIN = "Run the export stage again, or copy the folder again and completely."


def find_export(folder: Path) -> Path:
    """The folder of the export that a run or an export folder stands for.

    Raises:
        UserError: it is neither, or its export stage is not done.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Give run=FOLDER, as 'Report:' names it at the end of a run.")
    if not (folder / "run.json").is_file():
        if (folder / CONFIG).is_file():
            return folder
        runs = sorted(path.parent.name for path in folder.glob("*/run.json"))
        hint = f" It holds the runs {', '.join(runs)}: give one of them." if runs else ""
        raise UserError(f"{folder} is neither a run (no run.json) nor an export (no {CONFIG}).{hint}")
    record = read_json(folder / "run.json")
    exports = [folder / stage["folder"] for stage in record["stages"] if stage["verb"] == "export"]
    done = [path for path in exports if (path / "DONE").is_file()]
    if not done:
        command = re.sub(r" stage=\S+", "", record["command"])
        raise UserError(f"{folder} has no finished export. Finish the run: {command}")
    if len(done) > 1:
        raise UserError(f"{folder} has several exports. Give one of them as run=: {', '.join(map(str, done))}.")
    return done[0]


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of an export.

    Raises:
        UserError: it is missing, unfinished or of another format.
    """
    path = Path(folder) / CONFIG
    config = read_json(path)
    if "backbone" not in config:
        raise UserError(f"{path} does not describe an exported model: the export was not finished. {_AGAIN}")
    if config.get("format") != FORMAT:
        raise UserError(
            f"{path} has export format {config.get('format')}, and this version reads {FORMAT}. Export the student "
            "again with this version."
        )
    return config


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def load_exported(folder: Path) -> "SequentialRecommender":
    """The exported model as a PyTorch module, in evaluation mode; nothing but the folder is read.

    Raises:
        UserError: a file is missing, damaged or of another model or format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS
    config = read_config(folder)
    if not path.is_file():
        raise UserError(f"There is no {path}. Export with stages.export.export=[safetensors,onnx], or use as=onnx.")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}). {_AGAIN}") from error
    return rebuild(config, weights)


def rebuild(config: Mapping[str, Any], weights: Mapping[str, "Tensor"]) -> "SequentialRecommender":
    """Make the model that `config.json` describes and give it its weights.

    Raises:
        UserError: the weights are of another model.
    """
    import torch

    from lit_llmers.building import build_backbone
    from lit_llmers.conf.schema import FitStage, SequenceConfig
    from lit_llmers.students.sequential import SequentialRecommender

    described = FitStage(
        fit=config["backbone"]["name"],
        model=config["backbone"]["arguments"],
        sequences=SequenceConfig(max_length=config["max_length"]),
    )
    with torch.random.fork_rng(devices=[]):  # the initial weights, which are replaced, are not to shift anyone's dice
        table = torch.zeros(config["n_items"] + 1, config["dim"])
        offered = {"n_items": config["n_items"], "max_length": config["max_length"], "item_table": table}
        backbone = build_backbone(described, 0, offered)
    held = [name for name, _ in backbone.named_buffers(recurse=False, remove_duplicate=False)]
    for name in held:  # frozen item table, prompt; copied into aligned memory: else the last bit of a score may differ
        if name in weights:
            setattr(backbone, name, weights[name].clone())
    own = backbone.state_dict()
    expected = own.keys() | {name for name in held if backbone.get_buffer(name).numel()}
    wrong = sorted(expected ^ weights.keys()) or sorted(name for name in own if own[name].shape != weights[name].shape)
    if wrong:
        raise UserError(f"{WEIGHTS} is not of the model in {CONFIG}: they differ in '{wrong[0]}'. {_AGAIN}")
    backbone.load_state_dict({name: weights[name] for name in own})
    return SequentialRecommender(backbone).eval()


def score_catalogue(model: "SequentialRecommender", items: "Tensor", mask: "Tensor") -> "Tensor":
    """Scores `[B, n+1]` of all items for the histories `items [B, L]`; `-inf` for item 0, which is padding."""
    scores = model.encode(items, mask) @ model.item_table().T
    return scores.index_fill(1, items.new_zeros(1), float("-inf"))


class TorchScorer:
    """Scores histories with PyTorch, on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.model = load_exported(folder)

    def __call__(self, items: np.ndarray) -> np.ndarray:
        """Scores `[B, n+1]` float32 for the histories `[B, L]` int64, left-padded with 0."""
        import torch

        history = torch.from_numpy(items)
        with torch.inference_mode():
            return score_catalogue(self.model, history, history > 0).float().numpy()


# ---- ONNX ------------------------------------------------------------------------------------------------------------


class OnnxScorer:
    """Scores histories with ONNX Runtime, on the CPU."""

    def __init__(self, graph: Path) -> None:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        if not graph.is_file():
            raise UserError(f"There is no {graph}. Export with stages.export.export=[safetensors,onnx], or use as=torch.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        try:
            self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except (errors.Fail, errors.InvalidProtobuf, errors.InvalidGraph, errors.RuntimeException) as error:
            raise UserError(f"{graph} is damaged ({str(error).strip().splitlines()[0]}). {_AGAIN}") from error

    def __call__(self, items: np.ndarray) -> np.ndarray:
        """Scores `[B, n+1]` float32 for the histories `[B, L]` int64, left-padded with 0."""
        return self.session.run(["scores"], {"items": items, "mask": items > 0})[0]
