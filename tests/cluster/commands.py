"""Commands that start several processes, what they say, and the processes themselves."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def start(*given: str, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """`lit_llmers.fit` in a plain shell, or by a launcher."""
    program = [sys.executable, *launcher, "-m", "lit_llmers.fit", *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def until(process: subprocess.Popen[str], pattern: str) -> str:
    """What a process says up to the line that matches."""
    said = ""
    assert process.stderr is not None
    for line in process.stderr:
        said += line
        if re.search(pattern, line):
            return said
    raise AssertionError(f"it never said {pattern!r}:\n{said}")


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that it started for a stage, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            stat = (path.parent / "stat").read_text().rpartition(")")[2].split()
            variables = path.read_text()
        except OSError:
            continue
        rank = re.search(r"(?:^|\0)RANK=(\d+)\0", variables)
        if int(stat[1]) == process.pid and rank:
            found[int(rank[1])] = int(path.parent.name)
    return [found[rank] for rank in sorted(found)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
