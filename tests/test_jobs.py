"""Commands of a comparison that are processes of their own: which can begin, with what of the machine, and how they end."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_compare import METHOD
from tiny import arguments

from lit_llmers import comparable, compare, fit, jobs
from lit_llmers.errors import UserError


def stage(name: str, *needs: SimpleNamespace, verb: str = "fit", done: bool = False) -> SimpleNamespace:
    config = SimpleNamespace(trains=name.startswith("tuned"))
    return SimpleNamespace(label=name, folder=Path(name), needs=needs, verb=verb, done=done, config=config)


def planned(*stages: SimpleNamespace, folder: str = "one") -> SimpleNamespace:
    return SimpleNamespace(stages=stages, folder=Path(folder), arguments=["recipe=x"])


def test_a_stage_begins_when_all_that_it_needs_is_done():
    prepare, text = stage("prepare", done=True), stage("text")
    teacher, control = stage("teacher", prepare, text), stage("control", prepare)
    run = planned(prepare, text, teacher, control, stage("evaluate", control, verb="evaluate"))
    assert jobs.next_job(run, []).arguments == ["recipe=x", "only=text"]
    at_text, at_control, at_teacher = (jobs.Job(run, each) for each in (text, control, teacher))
    assert jobs.next_job(run, [at_text]).arguments == ["recipe=x", "only=control"], "the teacher waits for text"
    assert jobs.next_job(run, [at_text, at_control]) is None
    text.done = True
    assert jobs.next_job(run, []).stage is teacher
    assert jobs.next_job(run, [at_teacher]).stage is control, "what another run is at is not begun again"


def test_what_comes_after_training_is_one_process():
    student = stage("student", done=True)
    run = planned(student, stage("evaluate", student, verb="evaluate"), stage("export", student, verb="export"))
    job = jobs.next_job(run, [])
    assert (job.stage, job.arguments) == (None, ["recipe=x"])
    assert jobs.next_job(run, [job]) is None, "once"
    for each in run.stages:
        each.done = True
    assert jobs.next_job(run, []).stage is None, "and writes the report where that alone is missing"


def test_texts_are_encoded_by_one_at_a_time():
    first, second = (planned(stage(name, verb="encode"), stage("control"), folder=name) for name in ("items", "users"))
    at_first = jobs.next_job(first, [])
    assert at_first.stage.verb == "encode"
    assert jobs.next_job(second, [at_first]).stage.label == "control", "whose vectors may be made of the same texts"
    third = planned(stage("tuned", verb="encode"), folder="three")
    assert jobs.next_job(third, [at_first]).stage.label == "tuned", "by a model of its own"
    first.stages[0].done = True
    assert jobs.next_job(second, []).stage.label == "users"


def test_each_gets_its_own_gpu_and_its_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(7)))
    assert jobs.share_of_machine(0, 1) == {}, "alone it has all there is"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert jobs.share_of_machine(1, 3) == {"OMP_NUM_THREADS": "2", "LIT_LLMERS_JOBS": "3"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [jobs.share_of_machine(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-8f")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    given = {"OMP_NUM_THREADS": "5", "LIT_LLMERS_JOBS": "2"}
    assert jobs.share_of_machine(1, 2) == {"CUDA_VISIBLE_DEVICES": "GPU-8f", **given}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert jobs.share_of_machine(1, 2) == given, "none is to be used"


@pytest.mark.parametrize("given", ["jobs=0", "jobs=two", "jobs=-1", "jobs="])
def test_a_number_that_is_none_is_refused(given):
    with pytest.raises(UserError, match="how many stages are at work at once"):
        comparable.parse(["students=[sasrec]", given])


def test_groups_of_processes_are_not_for_several_at_once(tmp_path, capsys):
    given = ["students=[sasrec]", *arguments(tmp_path, "trainer=ddp", "trainer.devices=2", recipe="student")]
    assert compare.main([*given, "jobs=2"]) == 2
    assert "stage 'student' is for 2 processes" in capsys.readouterr().err


def test_several_at_once_make_what_one_after_the_other_makes(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, weight in (("one", 0.1), ("two", 0.3)):
        Path(f"{name}.yaml").write_text(METHOD.format(weight=weight))
    command = ["recipes=[one.yaml,two.yaml]", *(o for o in arguments(tmp_path, recipe="student") if not o.startswith("~"))]
    assert compare.main([*command, "jobs=2"]) == 0
    said = capfd.readouterr().err
    root, runs = comparable.planned_runs(comparable.parse(command))
    assert all(run.done for run in runs)
    (control,) = (root / "two" / "default").glob("control-*")
    assert control.is_symlink(), "trained once, in the first run that could"
    assert control.resolve().parent == (root / "one" / "default").resolve()
    assert f"{'two':<16} student-seed0" in said, "who speaks is said"
    assert said.count("control-seed0            starts") == 1
    alone = [*arguments(tmp_path / "alone", recipe="student"), "recipe=one.yaml"]
    assert fit.main([each for each in alone if not each.startswith("~") and each != "recipe=student"]) == 0
    (ours,) = (root / "one").rglob("ranks-student-seed0.npy")
    (theirs,) = (tmp_path / "alone").rglob("ranks-student-seed0.npy")
    np.testing.assert_array_equal(np.load(ours), np.load(theirs))
    shared = "Up to 2 stages were worked on at a time"
    assert shared in (root / "report.md").read_text()
    assert compare.main(command) == 0, "and nothing is done again"
    assert "starts" not in capfd.readouterr().err
    assert shared in (root / "report.md").read_text(), "the times are still those"
    assert shared in (root / "two" / "default" / "report.md").read_text(), "in a run's own report too"
    for done in root.rglob("evaluate-*/DONE"):
        done.unlink()
    assert compare.main(command) == 0, "something is done, this time alone"
    assert shared in (root / "report.md").read_text(), "the students' times are still those"


@pytest.mark.parametrize("number", [1, 2])
def test_a_recipe_that_is_changed_meanwhile_is_an_error_and_not_begun_for_ever(tmp_path, monkeypatch, capsys, number):
    monkeypatch.chdir(tmp_path)
    recipe, begun = Path("one.yaml"), 0
    recipe.write_text(METHOD.format(weight=0.1))

    def start(given: list[str], *_: object) -> str | None:
        nonlocal begun
        begun += 1
        recipe.write_text(METHOD.format(weight=0.1) + "data: {generator: {seed: 7}}\n")
        return "begun for ever" if fit.main(given) or begun > 3 else None

    monkeypatch.setattr(jobs, "start", start)
    command = ["recipes=[one.yaml]", *arguments(tmp_path, "trainer.max_epochs=1", recipe="student"), f"jobs={number}"]
    assert compare.main(command) == 1
    assert "error: one failed: it ended well without what it was to do: its recipe or" in capsys.readouterr().err
    assert begun == 1


def test_the_error_of_a_run_is_its_own_words():
    assert jobs.start(["recipe=slmrek"]).startswith("Unknown recipe 'slmrek'. Did you mean 'slmrec'?")
    assert jobs._error(1, "Traceback\n  File x\nValueError: old\n\ntorch.OutOfMemoryError: full\nsome more\n") == (
        "torch.OutOfMemoryError: full"
    )
    assert jobs._error(-9, "epoch 1") == "killed by SIGKILL, as the system does when memory runs out"
    assert jobs._error(3, "") == "exit status 3, without a word"


@pytest.mark.skipif(sys.platform != "linux", reason="a kernel's favour")
def test_a_killed_comparison_leaves_no_run_behind():
    program = """\
import subprocess, sys
from lit_llmers.jobs import _die_with_parent
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], preexec_fn=_die_with_parent())
print(child.pid, flush=True)
child.wait()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    state = Path(f"/proc/{child}/stat")
    for _ in range(100):
        if not state.is_file() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the run outlived its comparison")
