"""A recipe's chain of jobs on a real Slurm cluster of two nodes: told to stop in mid-epoch, and failing.

The cluster is `local_slurm.sh`'s: Slurm and munge in namespaces of their own on this machine. Where they are not installed
the tests are skipped; LIT_LLMERS_INSTALL_SLURM=1 lets them install both by apt-get first, as root, which .ci/run does.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_user import ROOT, STAGE, SUBMIT, bash, inherited
from tiny import arguments, losses, small

from lit_llmers import fit
from lit_llmers.journal import read_journal
from lit_llmers.stages import Stage

CLUSTER = str(Path(__file__).parent / "local_slurm.sh")
TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")
INSTALL = "apt-get install slurmctld slurmd slurm-client munge iproute2"
SECONDS = 600  # for a chain of jobs on a machine that has other work; alone it takes a fifth of that
STRATEGY = "zero3" if importlib.util.find_spec("deepspeed") else "ddp"
STEPS = 38  # of the teacher in an epoch
TEACHER = "stages.teacher.trainer={strategy: %s, devices: 1, num_nodes: %d, batch_size: 4, max_epochs: 3}"
# without dropout, for which every process draws numbers of its own
FEW = [
    "seeds=[0,1]",
    "stages.teacher.model.dropout=0",
    "stages.student.model.dropout=0",
    "stages.export.export=[safetensors]",
]


class Cluster:
    """Two nodes on this machine, and commands that run there."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def run(self, *command: str) -> str:
        done = bash(CLUSTER, "in", str(self.folder), *command, env=self.environment, cwd=ROOT)
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *given: str) -> dict[str, str]:
        """The ids of the jobs, by stage, from the table that is printed."""
        table = self.run("bash", SUBMIT, *given)
        return {line.split()[0]: line.split()[1] for line in table.splitlines()[2:]}

    def jobs(self) -> list[dict[str, str]]:
        """All jobs, the tasks of an array one by one, with Slurm's own keys."""
        blocks = self.run("scontrol", "show", "job").split("\n\n")
        return [dict(re.findall(r"(\w+)=(\S*)", block)) for block in blocks if "JobId=" in block]

    def job(self, number: str) -> dict[str, str]:
        return next(each for each in self.jobs() if each["JobId"] == number)

    def wait(self, done: Callable[[], Any], what: str) -> None:
        until = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < until, f"{what} took too long:\n{self.run('squeue')}\n{self.tails()}"
            time.sleep(0.1)

    def wait_for_restart(self, number: str) -> None:
        """Until a job that was queued again, once, has completed: the states on its way may look like an end."""
        done = {"JobState": "COMPLETED", "Restarts": "1"}
        self.wait(lambda: {key: self.job(number)[key] for key in done} == done, f"job {number}, queued again,")

    def ended(self) -> bool:
        return all(each["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED") for each in self.jobs())

    def tails(self) -> str:
        logs = {each["StdOut"] for each in self.jobs() if Path(each["StdOut"]).is_file()}
        return "\n".join(f"---- {log}\n{Path(log).read_text()[-2000:]}" for log in sorted(logs))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster of one's own needs root")
    if os.environ.get("LIT_LLMERS_INSTALL_SLURM") and not all(map(shutil.which, TOOLS)):
        bash(CLUSTER, "install")
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        pytest.skip(f"{', '.join(missing)} not here; for this test: {INSTALL}")
    hosts = Path("/etc/hosts").read_bytes()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds a socket
    with open(folder / "messages", "w") as messages:
        process = subprocess.Popen(
            ["bash", CLUSTER, "up", str(folder)], stdin=subprocess.PIPE, stdout=messages, stderr=messages
        )
    assert process.stdin is not None
    try:
        while not (folder / "up").exists():
            if process.poll() is not None:
                pytest.skip(f"a Slurm cluster does not start here: {(folder / 'messages').read_text()[-500:]}")
            time.sleep(0.1)
        yield Cluster(folder, inherited(tmp_path_factory.mktemp("a site")))
    finally:
        process.stdin.close()  # which ends it, also when this process is killed
        process.wait(30)
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in _read(path)]
        shutil.rmtree(folder)
        assert not left
        assert Path("/etc/hosts").read_bytes() == hosts


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of the same run, by one process and without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert fit.main(["recipe=slmrec", *arguments(folder, *FEW, TEACHER % ("auto", 1))]) == 0
    return folder


@pytest.fixture(scope="module")
def chain(tmp_path_factory, cluster) -> tuple[Path, dict[str, str]]:
    """A chain of jobs that ran to its end although its teacher was told to stop; its folder, and the jobs' ids by stage."""
    folder = tmp_path_factory.mktemp("chain")
    given = arguments(folder, *FEW, TEACHER % (STRATEGY, 2))
    ids = cluster.submit("recipe=slmrec", *given)
    teacher = next(stage for stage in small(folder, *given) if stage.name == "teacher")

    def in_mid_epoch() -> bool:
        return 3 < max(steps_of(teacher), default=0) % STEPS < STEPS / 2

    cluster.wait(in_mid_epoch, "the teacher's start")
    cluster.run("scancel", "--signal=USR1", ids["teacher"])
    cluster.wait(lambda: cluster.job(ids["teacher"])["JobState"] == "PENDING", "the teacher's requeue")
    stopped = max(steps_of(teacher))
    assert (stopped + 1) % STEPS, "not at the end of an epoch"
    cluster.wait(cluster.ended, "the chain")
    return folder, ids


def steps_of(stage: Stage) -> list[int]:
    """The steps that a training has logged, in the order in which it did."""
    return [entry["step"] for entry in read_journal(stage.folder / "metrics.jsonl") if "loss" in entry]


def stages_in(folder: Path) -> dict[str, Stage]:
    return {stage.label: stage for stage in small(folder, *FEW, TEACHER % ("auto", 1))}


@pytest.fixture(scope="module")
def both(chain, whole) -> tuple[dict[str, Stage], dict[str, Stage]]:
    ours, theirs = stages_in(chain[0]), stages_in(whole)
    assert {label: stage.folder.name for label, stage in ours.items()} == {
        label: stage.folder.name for label, stage in theirs.items()
    }
    return ours, theirs


def test_every_stage_of_the_chain_ran_once_and_the_teacher_on_both_nodes_twice(cluster, chain):
    folder, ids = chain
    jobs = cluster.jobs()
    assert {each["JobState"] for each in jobs} == {"COMPLETED"}, cluster.tails()
    number = {each["JobName"].split(".")[0]: each for each in jobs}
    assert len(jobs) == len(ids) + 2, "student and control are arrays of two"
    assert {name: each["Restarts"] for name, each in number.items() if each["Restarts"] != "0"} == {"teacher": "1"}
    assert [(each["NumNodes"], each["NumTasks"]) for name, each in number.items() if name in ("teacher", "signals")] == [
        ("2", "2")
    ] * 2
    log = (folder / "slmrec" / "default" / "slurm" / f"teacher-{ids['teacher']}.out").read_text()
    assert re.search(r"teacher: job \d+ on node\[1-2\], start 1\n", log)
    assert re.search(r"teacher: job \d+ on node\[1-2\], start 2\n", log)
    assert "Stopped by SIGUSR1. The same command goes on from here." in log
    assert log.count("task 0: Exited with exit code 3") == log.count("task 1: Exited with exit code 3") == 1
    assert (folder / "slmrec" / "default" / "report.md").is_file()


def test_the_interrupted_chain_ends_in_the_metrics_of_an_uninterrupted_run(both):
    ours, theirs = both
    assert steps_of(ours["teacher"]) == list(range(3 * STEPS)), "no step is lost, none is done again"
    for label, stage in theirs.items():
        if stage.verb == "fit":
            expected = losses(stage, "loss")
            assert losses(ours[label], "loss") == pytest.approx(expected, rel=1e-4), label
    models, expected = (
        json.loads((each["evaluate"].folder / "evaluation.json").read_text())["models"] for each in (ours, theirs)
    )
    assert [(model["name"], model["seed"]) for model in models] == [(model["name"], model["seed"]) for model in expected]
    for model, other in zip(models, expected, strict=True):
        one_user = 1 / other["metrics"]["all"]["users"]
        assert model["metrics"]["all"] == pytest.approx(other["metrics"]["all"], abs=one_user), (model["name"], model["seed"])


def test_one_srun_walks_the_list_and_forms_a_group_for_each_stage_of_both_nodes(cluster, whole, tmp_path):
    theirs, ours = stages_in(whole), stages_in(tmp_path)
    for label in ("prepare", "item_embeddings", "text"):  # which the chain has shown
        shutil.copytree(theirs[label].folder, ours[label].folder)
    student = "stages.student.trainer={strategy: ddp, devices: 1, num_nodes: 2}"
    given = [*arguments(tmp_path, *FEW, TEACHER % (STRATEGY, 2), student, "seeds=[0]"), "stage=student"]
    cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "lit_llmers.fit", "recipe=slmrec", *given)
    assert ours["signals"].done
    for label in ("teacher", "student-seed0"):
        assert ours[label].done
        assert losses(ours[label], "loss") == pytest.approx(losses(theirs[label], "loss"), rel=1e-4), label
        assert ours[label].summary["best"] == pytest.approx(theirs[label].summary["best"], abs=0.01), label


def test_what_follows_a_stage_that_fails_is_cancelled_and_the_reason_can_be_found(cluster, chain, tmp_path):
    made = stages_in(chain[0])
    here = stages_in(tmp_path)
    for label in ("prepare", "item_embeddings"):
        shutil.copytree(made[label].folder, here[label].folder)
    here["text"].folder.write_text("a file where the stage would write")
    ids = cluster.submit("recipe=slmrec", *arguments(tmp_path, *FEW, TEACHER % (STRATEGY, 2)), "stage=signals")
    assert ids["prepare"] == ids["item_embeddings"] == "done"
    cluster.wait(cluster.ended, "the failing chain")
    states = {stage: cluster.job(ids[stage]) for stage in ("text", "teacher", "signals")}
    assert (states["text"]["JobState"], states["text"]["ExitCode"]) == ("FAILED", "2:0")
    for stage in ("teacher", "signals"):
        assert (states[stage]["JobState"], states[stage]["Reason"]) == ("CANCELLED", "DependencyNeverSatisfied")
    log = (tmp_path / "slmrec" / "default" / "slurm" / f"text-{ids['text']}.out").read_text()
    assert "cannot be written" in log
    assert "text: exit status 2" in log


STAND_IN = """\
#!/usr/bin/env python3
# In the place of Python: waits for a signal and leaves with lit_llmers.fit's exit status; from the second start on, at once.
import os, signal, sys, time
for number, status in ((signal.SIGUSR1, 3), (signal.SIGTERM, 143)):
    signal.signal(number, lambda *_, status=status: sys.exit(status))
print("only:", sys.argv[-1], flush=True)
time.sleep(0 if int(os.environ.get("SLURM_RESTART_COUNT", 0)) else 600)
"""


def stand_in_job(cluster: Cluster, folder: Path, *options: str) -> str:
    """Start a job that only waits, in the shipped script and on both nodes; return its id when it waits."""
    (folder / "python").write_text(STAND_IN)
    (folder / "python").chmod(0o755)
    (folder / "site.sh").write_text(f"activate() {{ PYTHON=({folder}/python); }}\n")
    submitted = cluster.run(
        "sbatch", "--parsable", "--nodes=2", f"--output={folder}/out", *options, STAGE, f"{folder}/site.sh", "it", "all"
    )
    cluster.wait(lambda: log_of(folder).count("only: only=it") == 2, "the job's start")
    return submitted.strip()


def log_of(folder: Path) -> str:
    return (folder / "out").read_text() if (folder / "out").exists() else ""


def test_a_job_near_its_time_limit_is_queued_again(cluster, tmp_path):
    number = stand_in_job(cluster, tmp_path, "--time=2", "--signal=USR1@100")
    cluster.wait_for_restart(number)


def test_a_job_that_makes_room_for_an_urgent_one_comes_back_and_its_dependants_wait(cluster, tmp_path):
    number = stand_in_job(cluster, tmp_path)
    later = cluster.run(
        "sbatch",
        "--parsable",
        f"--dependency=afterok:{number}",
        "--kill-on-invalid-dep=yes",
        "--output=/dev/null",
        "--wrap=true",
    ).strip()
    cluster.run("srun", "--partition=urgent", "--nodes=2", "true")
    cluster.wait_for_restart(number)
    cluster.wait(cluster.ended, "the job that waited")
    assert cluster.job(later)["JobState"] == "COMPLETED"
    assert "it: exit status 143" in log_of(tmp_path)


def test_a_job_that_is_cancelled_stays_away(cluster, tmp_path):
    number = stand_in_job(cluster, tmp_path)
    cluster.run("scancel", number)
    cluster.wait(cluster.ended, "the job")
    assert (cluster.job(number)["JobState"], cluster.job(number)["Restarts"]) == ("CANCELLED", "0")
    assert "queued again" not in log_of(tmp_path)


def test_a_job_whose_node_is_lost_is_queued_again(cluster, tmp_path):
    number = stand_in_job(cluster, tmp_path)
    cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    cluster.wait(lambda: cluster.job(number)["JobState"] == "PENDING", "the requeue")
    cluster.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    cluster.wait_for_restart(number)
