"""What the plan of a run says, against the run."""

import warnings
from pathlib import Path
from zipfile import ZipFile

import pytest

from lit_llmers.backbones import CountingBackbone
from lit_llmers.building import find
from lit_llmers.planning.cards import card
from lit_llmers.planning.data import known_data
from lit_llmers.planning.estimate import Estimate, Estimator
from lit_llmers.planning.rehearsal import pretending
from lit_llmers.stages import Stage


def assert_planned(stages: list[Stage]) -> None:
    """The stages, all of them done, have the parameters and the files that were planned, and every model could be rehearsed."""
    known = known_data(next(stage for stage in stages if stage.verb == "prepare"), None)
    assert known is not None
    assert known.origin == "prepared"
    with warnings.catch_warnings(), pretending():
        warnings.simplefilter("ignore")
        estimator = Estimator(known, card("h100-80gb"), 0.4)
        planned = {stage.label: estimator(stage) for stage in stages}
    for stage in stages:
        _compare(stage, planned[stage.label])


def _compare(stage: Stage, planned: Estimate) -> None:
    assert not [note for note in planned.notes if "rehearsed" in note], f"{stage.label}: {planned.notes}"
    if stage.verb in ("fit", "tune"):
        assert planned.parameters is not None, stage.label
        counts = {key: planned.parameters[key] for key in ("total", "trainable")}
        assert counts == stage.summary["parameters"], stage.label
        counted = stage.verb == "fit" and issubclass(find("backbones", stage.config.fit), CountingBackbone)
        assert counted or planned.memory, stage.label
    if stage.verb in ("fit", "tune", "export"):
        assert planned.disk is not None
        written = sum(map(_content, _weights(stage.folder)))
        assert written == pytest.approx(planned.disk["kept"], rel=0.02, abs=4096), stage.label
    if stage.verb == "record":
        assert planned.disk is not None
        written = sum(path.stat().st_size for path in _shards(stage.folder))
        header = 128  # bytes of an npy file
        assert 0 <= written - planned.disk["kept"] <= header * len(_shards(stage.folder)), stage.label


def _weights(folder: Path) -> list[Path]:
    return [path for name in ("best.ckpt", "item_table.npy", "*.safetensors", "model.onnx*") for path in folder.rglob(name)]


def _content(path: Path) -> int:
    """Bytes of the tensors in a file."""
    if path.suffix == ".ckpt":
        with ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    if path.suffix == ".onnx":
        import onnx

        return sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer)
    return path.stat().st_size


def _shards(folder: Path) -> list[Path]:
    return list(folder.rglob("shard-*.npy"))
