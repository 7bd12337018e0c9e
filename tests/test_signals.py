"""Records on disk: what is written is read, an interruption costs one shard, what is foreign or damaged is refused."""

import copy
import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_llmers.errors import UserError
from lit_llmers.signals import SHARD_BYTES, SignalReader, SignalSpec, SignalWriter

SPEC = SignalSpec("states", rows=23, shape=(2, 3), dtype="float16", teacher="t1", split="s1", rows_per_shard=5)


def content(spec: SignalSpec = SPEC) -> torch.Tensor:
    """`[rows, *shape]` of values that differ everywhere and that every dtype holds exactly."""
    values = torch.arange(spec.rows * 6).reshape(spec.rows, *spec.shape)
    return values if spec.dtype == "int32" else values / 4


def record(folder: Path, spec: SignalSpec = SPEC) -> list[range]:
    """Write what is missing, in scrambled batches of three; return the shards that were written."""
    writer, values = SignalWriter(folder, spec), content(spec)
    missing = writer.missing()
    for rows in missing:
        with writer.shard(rows) as shard:
            for batch in (torch.randperm(len(rows)) + rows.start).split(3):
                shard.write(batch.numpy(), values[batch])
    writer.finish()
    return missing


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def whole(tmp_path):
    record(tmp_path / "record")
    return tmp_path / "record"


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- writing and reading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32"])
@pytest.mark.parametrize("rows_per_shard", [1, 5, 23, 100, None])
def test_what_is_written_is_read(tmp_path, dtype, rows_per_shard):
    spec = replace(SPEC, dtype=dtype, rows_per_shard=rows_per_shard)
    shards = record(tmp_path, spec)
    assert [row for rows in shards for row in rows] == list(range(23))
    reader = SignalReader(tmp_path, teacher="t1", split="s1", rows=23)
    assert (reader.shape, len(reader), reader.dtype) == ((2, 3), 23, getattr(torch, dtype))
    for rows in ([0], [22, 0, 7, 7, 4, 5, 22], [], list(range(22, -1, -1))):
        for index in (torch.tensor(rows, dtype=torch.long), np.array(rows, dtype=np.int64)):
            got = reader[index]
            assert got.dtype == getattr(torch, dtype)
            assert got.shape == (len(rows), 2, 3)
            assert torch.equal(got, content(spec)[torch.tensor(rows, dtype=torch.long)].to(got.dtype))


def test_what_is_read_is_a_copy(whole):
    reader = SignalReader(whole)
    reader[torch.arange(23)].zero_()
    assert torch.equal(reader[torch.arange(23)].float(), content())
    SignalReader(whole)


def test_shards_are_of_about_128_megabytes():
    spec = replace(SPEC, rows=1_000_000, shape=(4, 4096), rows_per_shard=None)
    assert len(spec.shards[0]) * 4 * 4096 * 2 == SHARD_BYTES == 128 * 2**20
    assert len(replace(SPEC, rows=2, shape=(2**28,), rows_per_shard=None).shards) == 2


def test_device_precision_of_the_teacher_is_converted(tmp_path):
    writer = SignalWriter(tmp_path, replace(SPEC, rows=2, rows_per_shard=2))
    values = torch.full((2, 2, 3), 0.1, dtype=torch.bfloat16, requires_grad=True)
    with writer.shard(range(2)) as shard:
        shard.write(torch.arange(2), values)
    writer.finish()
    assert torch.equal(SignalReader(tmp_path)[torch.arange(2)], values.detach().half())


def test_a_copied_or_pickled_reader_does_not_carry_the_record(tmp_path):
    record(tmp_path, replace(SPEC, rows=5000, rows_per_shard=None))
    reader = SignalReader(tmp_path)
    reader[torch.arange(10)]
    frozen = pickle.dumps(reader)
    assert len(frozen) < 2000
    for other in (pickle.loads(frozen), copy.deepcopy(reader)):
        assert torch.equal(other[torch.tensor([4999])], reader[torch.tensor([4999])])


@pytest.mark.parametrize("row", [-1, 23, 10**12])
def test_rows_outside_of_the_record(whole, row):
    with pytest.raises(UserError, match=r"has rows 0\.\.22"):
        SignalReader(whole)[torch.tensor([3, row])]


# ---- interruption --------------------------------------------------------------------------------------------------


def test_an_interrupted_recording_goes_on_at_the_first_missing_shard(tmp_path):
    writer = SignalWriter(tmp_path, SPEC)
    with writer.shard(range(5)) as shard:
        shard.write(np.arange(5), content()[:5])
    with writer.shard(range(10, 15)) as shard:
        shard.write(np.arange(10, 15), content()[10:15])
    with pytest.raises(KeyboardInterrupt), writer.shard(range(5, 10)) as shard:  # noqa: PT012
        shard.write(np.arange(5, 8), content()[5:8])
        raise KeyboardInterrupt
    assert files(tmp_path) == [
        "shard-00000.json",
        "shard-00000.npy",
        "shard-00002.json",
        "shard-00002.npy",
        "spec.json",
    ]
    with pytest.raises(UserError, match="unfinished"):
        SignalReader(tmp_path)
    with pytest.raises(RuntimeError, match="shard 1 of"):
        writer.finish()
    before = (tmp_path / "shard-00002.npy").stat().st_mtime_ns
    assert record(tmp_path) == [range(5, 10), range(15, 20), range(20, 23)]
    assert (tmp_path / "shard-00002.npy").stat().st_mtime_ns == before, "a whole shard is not written again"
    assert torch.equal(SignalReader(tmp_path)[torch.arange(23)].float(), content())
    assert record(tmp_path) == []


def test_a_killed_recording_leaves_nothing_that_stays(tmp_path):
    code = f"""
import os, signal, sys
import numpy as np
sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
from test_signals import SPEC, SignalWriter, content
writer = SignalWriter({str(tmp_path)!r}, SPEC)
for number, rows in enumerate(writer.missing()):
    with writer.shard(rows) as shard:
        shard.write(np.array(rows[:2]), content()[rows.start : rows.start + 2])
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        shard.write(np.array(rows[2:]), content()[rows.start + 2 : rows.stop])
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    left = files(tmp_path)
    assert "shard-00000.npy" in left
    assert "shard-00001.npy" not in left
    assert [name for name in left if name.endswith(".tmp")], "the kill came too early or too late to show anything"
    assert record(tmp_path)[0] == range(5, 10)
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]
    assert torch.equal(SignalReader(tmp_path)[torch.arange(23)].float(), content())


@pytest.mark.parametrize("damage", ["no sidecar", "no array", "truncated"])
def test_a_shard_that_is_not_whole_is_written_again(whole, damage):
    array = whole / "shard-00003.npy"
    if damage == "no sidecar":
        array.with_suffix(".json").unlink()
    elif damage == "no array":
        array.unlink()
    else:
        os.truncate(array, 100)
    assert record(whole) == [range(15, 20)]
    assert torch.equal(SignalReader(whole)[torch.arange(23)].float(), content())


def test_a_shard_with_unwritten_rows_is_not_kept(tmp_path):
    writer = SignalWriter(tmp_path, SPEC)
    with pytest.raises(RuntimeError, match=r"row 7 of .*shard-00001"), writer.shard(range(5, 10)) as shard:
        shard.write(np.array([5, 6, 8, 9]), content()[[5, 6, 8, 9]])
    assert files(tmp_path) == ["spec.json"]


@pytest.mark.parametrize("key", ["teacher", "split", "dtype", "shape", "rows", "name", "rows_per_shard"])
def test_another_record_is_not_continued(tmp_path, key):
    changed = {"dtype": "float32", "shape": (2, 4), "rows": 24, "rows_per_shard": 6}
    SignalWriter(tmp_path, SPEC)
    with pytest.raises(UserError, match=f"holds another record: its {key} is .* Remove the folder"):
        SignalWriter(tmp_path, replace(SPEC, **{key: changed.get(key, "other")}))


# ---- what cannot be written ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "dtype", "cure"),
    [
        (70000.0, "float16", r"says 70000 at row 7, place \[1, 0\] .* does not fit float16.*signals.dtype=float32"),
        (float("nan"), "float16", "says nan at row 7.*diverged"),
        (float("-inf"), "float32", "says -inf at row 7.*trainer.precision=32-true"),
        (2**31, "int32", r"says 2\.14748e\+09 at row 7.*does not fit int32"),
    ],
)
def test_a_value_that_does_not_fit_is_named(tmp_path, value, dtype, cure):
    spec = replace(SPEC, dtype=dtype)
    writer, values = SignalWriter(tmp_path, spec), content(spec)[5:10]
    values[2, 1, 0] = value
    with pytest.raises(UserError, match=cure), writer.shard(range(5, 10)) as shard:
        shard.write(np.arange(5, 10), values)
    assert files(tmp_path) == ["spec.json"]


def test_misuse_is_refused(tmp_path):
    writer = SignalWriter(tmp_path, SPEC)
    with pytest.raises(ValueError, match="is not in list"), writer.shard(range(4, 9)):
        pass
    for rows, values, message in (
        (np.arange(3), content()[:2], "values of shape"),
        (np.array([4, 5]), content()[4:6], r"rows 0\.\.4"),
        (np.arange(2), content()[:2].int(), "int32 for a record of float16"),
    ):
        with pytest.raises(ValueError, match=message), writer.shard(range(5)) as shard:
            shard.write(rows, values)
    assert files(tmp_path) == ["spec.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "Unknown dtype .*signals.dtype.* Did you mean 'float16'"),
        ({"rows": 0}, "nothing to record"),
        ({"rows_per_shard": 0}, "signals.shard_rows is 0"),
    ],
)
def test_a_spec_that_makes_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        replace(SPEC, **change)


@pytest.mark.parametrize("moment", ["reserving", "renaming", "sidecar"])
def test_a_full_disk_leaves_no_half_written_shard(tmp_path, monkeypatch, moment):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = SignalWriter(tmp_path, SPEC)
    with writer.shard(range(5)) as shard:
        shard.write(np.arange(5), content()[:5])
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on the disk"):  # noqa: PT012
        if moment == "reserving":
            patch.setattr(os, "posix_fallocate", full)
        elif moment == "sidecar":
            patch.setattr(Path, "write_text", full)
        with writer.shard(range(5, 10)) as shard:
            if moment == "renaming":
                patch.setattr(os, "fsync", full)
            shard.write(np.arange(5, 10), content()[5:10])
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]
    assert SignalWriter(tmp_path, SPEC).missing()[0] == range(5, 10)
    assert record(tmp_path)[0] == range(5, 10)
    assert torch.equal(SignalReader(tmp_path)[torch.arange(23)].float(), content())


def test_the_blocks_of_a_shard_are_claimed_before_it_is_filled(tmp_path):
    spec = replace(SPEC, rows=4000, rows_per_shard=4000)
    writer = SignalWriter(tmp_path, spec)
    with pytest.raises(KeyboardInterrupt), writer.shard(range(4000)):  # noqa: PT012
        (temporary,) = tmp_path.glob(".shard-*.tmp")
        assert temporary.stat().st_blocks * 512 >= 4000 * 12
        raise KeyboardInterrupt


def test_no_permission(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(UserError, match="No permission"):
        SignalWriter(tmp_path / "record", SPEC)


# ---- what is not read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"teacher": "t2"}, "of another teacher: t1 instead of t2"),
        ({"split": "s2"}, "of another split: s1 instead of s2"),
        ({"rows": 24}, "of another number of rows: 23 instead of 24"),
    ],
)
def test_a_foreign_record_is_refused(whole, wanted, message):
    with pytest.raises(UserError, match=message + r".*Remove .* run the stage"):
        SignalReader(whole, **wanted)


def test_another_format_version_is_refused(whole):
    edit_manifest(whole, format_version=99, something_new=1)
    with pytest.raises(UserError, match="another format version: 99 instead of 1"):
        SignalReader(whole)


def test_a_missing_record(tmp_path):
    with pytest.raises(UserError, match=r"does not exist\. Run the stage that records it"):
        SignalReader(tmp_path / "nowhere")


def test_a_damaged_shard_is_named(whole, tmp_path):
    for damage, message in (
        (lambda shard: shard.unlink(), "is missing"),
        (lambda shard: os.truncate(shard, shard.stat().st_size - 1), "is damaged: it has 187 bytes instead of 188"),
        (lambda shard: flip(shard), "was altered: its SHA-256"),
    ):
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        damage(folder / "shard-00002.npy")
        with pytest.raises(UserError, match=f"shard-00002.npy {message}"):
            SignalReader(folder)
        shutil.rmtree(folder)


def test_the_folder_to_remove_is_the_real_one(whole, tmp_path):
    edit_manifest(whole, format_version=99)
    link = tmp_path / "elsewhere" / "linked"
    link.parent.mkdir()
    link.symlink_to(whole)
    for given, removed in (({}, whole.parent), ({"remove": link}, whole)):
        with pytest.raises(UserError, match=f"Remove {removed.resolve()} and run"):
            SignalReader(link, **given)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_without_verification_the_content_is_trusted_but_not_the_size(whole):
    flip(whole / "shard-00002.npy")
    assert len(SignalReader(whole, verify=False)) == 23
    os.truncate(whole / "shard-00002.npy", 150)
    with pytest.raises(UserError, match="damaged"):
        SignalReader(whole, verify=False)


# ---- memory --------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from lit_llmers.signals import SignalReader, SignalSpec, SignalWriter

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024

rows, shape, batch = 75_000, (4, 512), 512
spec = SignalSpec("states", rows, shape, "float16", "t", "s", rows_per_shard=int(sys.argv[2]))
torch.ones(batch, *shape).half() + 1  # allocator and kernels are warm
before = status("RssAnon")
room = 64 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + room, resource.RLIM_INFINITY))
try:
    np.ones(rows * 2048, dtype=np.float16)
    sys.exit("the limit does not bite")
except MemoryError:
    pass
writer = SignalWriter(Path(sys.argv[1]), spec)
for part in writer.missing():
    with writer.shard(part) as shard:
        for start in range(part.start, part.stop, batch):
            index = torch.arange(start, min(start + batch, part.stop))
            shard.write(index, (index % 2000).float()[:, None, None].expand(-1, *shape))
writer.finish()
reader = SignalReader(Path(sys.argv[1]), teacher="t", split="s", rows=rows)
for index in torch.randperm(rows, generator=torch.Generator().manual_seed(0)).split(batch):
    assert (reader[index] == (index % 2000).half()[:, None, None]).all()
growth = status("RssAnon") - before
print(f"record {rows * 4096 / 2**20:.0f} MB, private memory grew by {growth / 2**20:.1f} MB")
assert growth < room
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits mappings on Linux only")
@pytest.mark.parametrize("rows_per_shard", [75_000, 30_000])
def test_a_record_larger_than_memory_is_written_and_read(tmp_path, rows_per_shard):
    """A record of 293 MB in a process that may allocate 64 MB; the first case has it in one shard."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(rows_per_shard)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
