"""What a run ran on: enough to repeat it, or to see why a repetition differs."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lit_llmers.files import read_json, write_json

PACKAGES = (
    "lit-llmers",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "deepspeed",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
    "numpy",
    "pandas",
    "scipy",
    "scikit-learn",
    "safetensors",
    "onnx",
    "onnxruntime",
    "wandb",
)

JOBS = "LIT_LLMERS_JOBS"  # says to a stage that others are worked on beside it, and how many with it


def recorded(folder: Path, worked: bool) -> dict[str, Any]:
    """The folder's `environment.json`, written anew only where something was worked out now.

    A run that is given again when all of it is done keeps the date and the machine that made it.
    """
    path = folder / "environment.json"
    if worked or not path.is_file():
        write_json(path, environment())
    return read_json(path)


def environment() -> dict[str, Any]:
    """Describe this process's machine and software, JSON-able.

    Keys: `date` (UTC, ISO 8601), `command`, `python`, `platform`, `cpu`, `cores` (that this process may use), `threads`
    (of PyTorch), `memory_gb`, `gpus` (names), `cuda` (version or None), `packages` (versions; those not installed are
    left out), `git` (`commit` and `dirty` of the checkout that the package lies in, or None).
    """
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "packages": _packages(),
        "git": code(),
    }


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jobs() -> int:
    """How many stages a comparison works on at a time, of which this process has one; else 1."""
    return int(os.environ.get(JOBS, "1"))


def threads(processes: int) -> dict[str, str]:
    """The environment of one of so many processes that share the cores; what a user has set stands."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // processes))}


def device(machine: dict[str, Any]) -> str:
    """What computes on a machine that `environment` describes: its GPUs by name, or its processor and its cores."""
    return ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"


def command_line() -> str:
    """The command that started this process, as it would be typed: `python -m package.module` for a module of ours."""
    import shlex

    program = Path(sys.argv[0])
    package = Path(__file__).parent
    if program.suffix == ".py" and program.resolve().is_relative_to(package):
        module = ".".join(program.resolve().relative_to(package.parent).with_suffix("").parts)
        return shlex.join(["python", "-m", module, *sys.argv[1:]])
    return shlex.join([program.name, *sys.argv[1:]])


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):  # not a POSIX system, or one that does not say
        return None


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code() -> dict[str, Any] | None:
    """`commit` and `dirty` of the checkout that the package lies in, or None."""
    return _git(Path(__file__).parent)


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit and state of the checkout that tracks `folder`; None outside one or without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an installed package may lie in somebody else's checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
