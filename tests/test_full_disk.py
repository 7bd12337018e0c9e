"""A disk that fills up: one line says so and what to do, nothing half-written stays, and the same command goes on."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, ended, fork, results, strays
from tiny import arguments

from lit_llmers import fit

FEW = ["signals.shard_rows=300", "stages.export.export=[safetensors]", "trainer.max_epochs=2"]


def command(folder) -> list[str]:
    return ["recipe=slmrec", *arguments(folder, *FEW)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert fit.main(command(folder)) == 0
    return results(folder, *FEW)


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, and how to set its size in KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: int, *more: str) -> bool:
        options = ",".join([f"size={size}k", *more])
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode == 0

    if sys.platform != "linux" or os.geteuid() != 0 or not resize(64):
        pytest.skip("a disk of one's own needs root")
    yield folder, lambda size: resize(size, "remount")
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_a_run_on_a_disk_that_is_ever_too_small_says_so_and_goes_on(whole, disk, tmp_path):
    folder, resize = disk
    size, times = 64, 0
    while True:
        messages = tmp_path / f"messages-{size}"

        def run_quietly(file=messages) -> int:
            with open(file, "w") as sys.stderr:
                return fit.main(command(folder))

        status = ended(fork(run_quietly))
        if status == 0:
            break
        said = messages.read_text()
        assert status == 2, said
        (error,) = (line for line in said.splitlines() if line.startswith("error:"))
        assert "No space left on" in error, said
        assert "the same command again" in error
        assert str(folder) in error
        assert "Traceback" not in said
        assert not [path for path in strays(folder) if not path.endswith("last.ckpt")]
        size, times = int(size * 1.5), times + 1
        assert resize(size)
    assert times > 5
    assert_same_run(folder, whole, times, *FEW)


@pytest.mark.parametrize("file", ["last.ckpt", "best.ckpt", "shard-00000.npy", "item_table.npy", "DONE"])
def test_a_disk_that_is_full_at_a_file(tmp_path, monkeypatch, capsys, file):
    replace = os.replace

    def full(source, target):
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert fit.main(command(tmp_path)) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert f"No space left on the disk while writing {tmp_path}" in error
    assert file in error
    assert not [path for path in strays(tmp_path) if not path.endswith("last.ckpt")]
    assert not list(tmp_path.rglob(file))
