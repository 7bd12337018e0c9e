"""An exported student at work, from its own folder alone: no run, no teacher, no data, and with ONNX no torch either.

An export is `config.json` (how to build the model, and where it comes from), `items.parquet` (the catalogue),
`model.safetensors` (the weights) and `model.onnx` (the whole model as one graph). A student that knows its users by
themselves and not by their histories has `users.parquet` beside them: who they are and what they have met. `README.md` says
how to ask the graph without this project.
"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_llmers.errors import UserError
from lit_llmers.files import read_json
from lit_llmers.serving.exported import AGAIN, CONFIG, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

    from lit_llmers.students.recommender import Recommender

FORMAT = 1  # raised when a folder written before can no longer be read


def find_export(folder: Path) -> Path:
    """The folder of the export that a run or an export folder stands for.

    Raises:
        UserError: it is neither, or its export stage is not done.
    """
    folder = Path(folder).expanduser()
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
        earlier = sorted(str(path.parent) for path in folder.glob("export-*/DONE"))
        hint = f" of its last command; of earlier ones, give one as run=: {', '.join(earlier)}" if earlier else ""
        raise UserError(f"{folder} has no finished export{hint}. {_to_export(record['command'], bool(exports))}")
    if len(done) > 1:
        raise UserError(f"{folder} has several exports. Give one of them as run=: {', '.join(map(str, done))}.")
    return done[0]


def _to_export(command: str, planned: bool) -> str:
    """How a run gets an export: by its command, in which it may be `planned` or left out."""
    if planned:
        return f"Finish the run: {command}"
    words = shlex.split(command)
    kept = [word for word in words if not word.startswith("~stages.export")]
    if len(kept) < len(words):
        return f"Run it with its export stage: {shlex.join(kept)}"
    return "Its recipe has no export stage: give it one, as recipes/student.yaml has."


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of an export.

    Raises:
        UserError: it is missing, unfinished or of another format.
    """
    path = Path(folder) / CONFIG
    config = read_json(path)
    if "backbone" not in config:
        raise UserError(f"{path} does not describe an exported model: the export was not finished. {AGAIN}")
    if config.get("format") != FORMAT:
        raise UserError(
            f"{path} has export format {config.get('format')}, and this version reads {FORMAT}. Export the student "
            "again with this version."
        )
    return config


def inputs_of(asked: np.ndarray) -> dict[str, np.ndarray]:
    """What a model reads of the users in question: rows of its table `[B]`, or histories `[B, L]`; int64."""
    return {"user": asked} if asked.ndim == 1 else {"items": asked, "mask": asked > 0}


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def load_exported(folder: Path) -> "Recommender":
    """The exported model as a PyTorch module, in evaluation mode; nothing but the folder is read.

    Raises:
        UserError: a file is missing, damaged or of another model or format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from lit_llmers.serving.served import rebuild

    path = Path(folder) / WEIGHTS
    config = read_config(folder)
    if not path.is_file():
        raise UserError(f"There is no {path}. Export with stages.export.export=[safetensors,onnx], or use as=onnx.")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}). {AGAIN}") from error
    return rebuild(config, weights)


def score_catalogue(model: "Recommender", max_length: int, *inputs: "Tensor") -> "Tensor":
    """Scores `[B, n+1]` of all items; `-inf` for item 0, which is padding.

    Args:
        max_length: items of a history that are read, the latest ones.
        inputs: `items [B, L]` int64 and `mask [B, L]` bool; for a collaborative model `user [B]` int64.
    """
    from lit_llmers.serving.served import served

    return served(model, max_length)(*inputs)


class TorchScorer:
    """Scores for users with PyTorch, on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.model, self.max_length = load_exported(folder), read_config(folder)["max_length"]

    def __call__(self, asked: np.ndarray) -> np.ndarray:
        """Scores `[B, n+1]` float32 for histories `[B, L]` int64, left-padded with 0, or for users `[B]` int64, 0..U-1."""
        import torch

        with torch.inference_mode():
            inputs = map(torch.from_numpy, inputs_of(asked).values())
            return score_catalogue(self.model, self.max_length, *inputs).float().numpy()


# ---- ONNX ------------------------------------------------------------------------------------------------------------


class OnnxScorer:
    """Scores for users with ONNX Runtime, on the CPU."""

    def __init__(self, graph: Path) -> None:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as errors

        if not graph.is_file():
            raise UserError(f"There is no {graph}. Export with stages.export.export=[safetensors,onnx], or use as=torch.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        try:
            self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except (
            errors.Fail,
            errors.InvalidArgument,  # as of an empty file
            errors.InvalidProtobuf,
            errors.InvalidGraph,
            errors.RuntimeException,
        ) as error:
            raise UserError(f"{graph} is damaged ({str(error).strip().splitlines()[0]}). {AGAIN}") from error

    def __call__(self, asked: np.ndarray) -> np.ndarray:
        """Scores `[B, n+1]` float32 for histories `[B, L]` int64, left-padded with 0, or for users `[B]` int64, 0..U-1."""
        return self.session.run(["scores"], inputs_of(asked))[0]
