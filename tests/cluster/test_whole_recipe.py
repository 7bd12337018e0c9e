"""A whole recipe in one start of two processes: a process group for each stage that is shared, the others by rank 0 alone."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from commands import TORCHRUN, start
from runs import strays
from tiny import arguments, losses, small, weights

from lit_llmers import fit
from lit_llmers.signals import SignalReader
from lit_llmers.stages import Stage

SHARDED = "zero3" if importlib.util.find_spec("deepspeed") else "fsdp2"
FEW = [  # without dropout, for which every process draws numbers of its own
    "seeds=[0,1]",
    "stages.teacher.model.dropout=0",
    "stages.student.model.dropout=0",
    "stages.item_embeddings.model.dropout=0",
    "stages.export.export=[safetensors]",
    "signals.dtype=float32",
    "trainer.max_epochs=2",
]
TWO = [
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    f"trainer.strategy={SHARDED}",  # of teacher, students and controls
    "stages.item_embeddings.trainer={strategy: ddp, devices: 2}",
    "stages.control.trainer={strategy: ddp, devices: 2}",
]


def by_label(stages: list[Stage]) -> dict[str, Stage]:
    return {stage.label: stage for stage in stages}


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[dict[str, Stage], dict[str, Stage]]:
    """The stages of two processes, and those of one."""
    two, one = (tmp_path_factory.mktemp(name) for name in ("two", "one"))
    process = start("recipe=slmrec", *arguments(two, *FEW, *TWO), launcher=TORCHRUN)
    assert fit.main(["recipe=slmrec", *arguments(one, *FEW)]) == 0
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    return by_label(small(two, *FEW, *TWO)), by_label(small(one, *FEW))


def test_every_stage_is_run_by_as_many_as_it_is_for(both):
    shared = {label: stage.trainer.strategy for label, stage in both[0].items() if stage.processes == 2}
    students = {f"student-seed{seed}": SHARDED for seed in (0, 1)} | {f"control-seed{seed}": "ddp" for seed in (0, 1)}
    assert shared == {"item_embeddings": "ddp", "teacher": SHARDED, "signals": SHARDED} | students
    assert all(stage.done for stage in both[0].values())
    assert {label: stage.folder.name for label, stage in both[0].items()} == {
        label: stage.folder.name for label, stage in both[1].items()
    }


def test_each_trains_what_one_process_trains(both):
    for label, stage in both[1].items():
        if stage.verb == "fit":
            assert losses(both[0][label], "loss") == pytest.approx(losses(stage, "loss"), rel=1e-3), label
            for name, value in weights(stage).items():
                found = weights(both[0][label])[name]
                torch.testing.assert_close(found, value, rtol=1e-2, atol=1e-2, msg=f"{label}: {name}")


def test_the_record_is_that_of_one_process(both):
    ours, theirs = (SignalReader(stages["signals"].folder / "block_states") for stages in both)
    rows = torch.arange(len(theirs))
    torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-2, atol=1e-2)


def test_the_report_is_written_and_its_figures_are_those_of_one_process(both):
    ours, theirs = (json.loads((stages["evaluate"].folder / "evaluation.json").read_text())["models"] for stages in both)
    assert [(model["name"], model["seed"]) for model in ours] == [(model["name"], model["seed"]) for model in theirs]
    for model, other in zip(ours, theirs, strict=True):
        one_user = 1 / other["metrics"]["all"]["users"]
        assert model["metrics"]["all"] == pytest.approx(other["metrics"]["all"], abs=one_user), (model["name"], model["seed"])
    run_folder: Path = both[0]["evaluate"].run.folder
    assert (run_folder / "report.md").is_file()
    assert not strays(run_folder)
