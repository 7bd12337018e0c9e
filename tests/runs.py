"""All that a run of the smallest SLMRec worked out, to compare a run that was disturbed with one that was not."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import by_name, small, weights

from lit_llmers.journal import read_metrics


def fork(action: Callable[[], int]) -> int:
    """Do something in a forked process, which saves it the seconds of its imports; returns its number."""
    child = os.fork()
    if child == 0:
        try:
            status = action()
        except BaseException:  # a forked pytest must never go on as pytest
            status = 70
        os._exit(status)
    return child


def ended(child: int) -> int:
    """Wait for a forked process; returns its exit status, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def results(folder: Path, *overrides: str) -> dict[str, Any]:
    """All that a run worked out, timings left out."""
    stages = by_name(small(folder, *overrides))
    assert all(stage.done for stage in stages.values())
    evaluated = json.loads((stages["evaluate"].folder / "evaluation.json").read_text())
    fits = [stage for stage in stages.values() if stage.verb == "fit"]
    return {
        "losses": {stage.name: logged(stage, "loss") for stage in fits},
        "protocol": evaluated["protocol"],
        "models": [{key: m[key] for key in ("name", "seed", "metrics", "popularity")} for m in evaluated["models"]],
        "ranks": [np.load(stages["evaluate"].folder / m["ranks"]).tolist() for m in evaluated["models"]],
        "weights": {stage.name: weights(stage) for stage in fits},
        "tables": {stage.name: (stage.folder / "item_table.npy").read_bytes() for stage in [*fits, stages["text"]]},
        "shards": {path.name: path.read_bytes() for path in stages["signals"].folder.rglob("*.npy")},
        "validation": {stage.name: logged(stage, "val/") for stage in fits},
        "export": (stages["export"].folder / "model.safetensors").read_bytes(),
        "best": {stage.name: stage.summary["best"] for stage in fits},
        "epochs": {stage.name: stage.summary["epochs"] for stage in fits},
    }


def logged(stage, prefix: str) -> dict[int, dict]:
    """What a stage logged at each step under this prefix."""
    entries = {entry["step"]: entry for entry in read_metrics(stage.folder / "metrics.jsonl")}
    named = {step: {k: v for k, v in entry.items() if k.startswith(prefix)} for step, entry in entries.items()}
    return {step: entry for step, entry in named.items() if entry}


def assert_same(ours, theirs, where: str = "") -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{where}/{key}")
    elif isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_same_run(folder: Path, whole: dict[str, Any], kills: int, *overrides: str) -> None:
    """A run that was killed so many times and went on ends as the whole one did, and leaves nothing lying about."""
    ours = results(folder, *overrides)
    for name, steps in whole["losses"].items():
        # a step is logged after the checkpoint that it may end with, so a kill may lose that line, and no other
        lost = steps.keys() - ours["losses"][name].keys()
        assert len(lost) <= kills, name
        assert ours["losses"][name] == {step: entry for step, entry in steps.items() if step not in lost}, name
    assert_same(ours | {"losses": None}, whole | {"losses": None})
    assert strays(folder) == [], strays(folder)


def strays(folder: Path) -> list[str]:
    """What a run that is done should not leave."""
    return [
        str(path)
        for path in folder.rglob("*")
        if path.name in (".lock", "last.ckpt") or path.name.endswith((".tmp", ".previous"))
    ]
