"""A file is whole or absent, whatever happens while it is written."""

import errno
from pathlib import Path

import numpy as np
import pytest

from lit_llmers.errors import UserError
from lit_llmers.files import atomic_write, digest, read_json, sha256, writable, write_json
from lit_llmers.reporting.results import Evaluated


def test_the_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path, "on the same disk, where a rename is atomic"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        fail(path)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]


def fail(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0


def plain(file) -> None:
    file.write(b"x" * 100_000)


def numpy(file) -> None:  # which says "n requested and m written", without a number for the error
    np.save(file, np.zeros(100_000), allow_pickle=False)


def test_a_full_disk_is_named_too_where_a_library_raises_what_is_no_exception(tmp_path):
    class CheckpointException(BaseException):
        pass

    def fill() -> None:
        with writable(tmp_path / "last.ckpt"):
            raise CheckpointException("rank 1: OSError: [Errno 28] No space left on device")

    with pytest.raises(UserError, match=r"No space left on the disk while writing .*last\.ckpt.*Free some space"):
        fill()
    with pytest.raises(KeyboardInterrupt), writable(tmp_path / "last.ckpt"):
        raise KeyboardInterrupt


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is always full")
@pytest.mark.parametrize("write", [plain, numpy])
def test_a_full_disk_is_named_with_the_cure(tmp_path, write):
    def fill() -> None:
        with atomic_write(tmp_path / "data.npy") as temporary, open("/dev/full", "wb") as file:
            temporary.write_bytes(b"half")
            write(file)

    with pytest.raises(UserError, match=r"No space left on the disk while writing .*data\.npy.*Free some space"):
        fill()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_no_permission_is_named_with_the_cure(tmp_path, number):
    with pytest.raises(UserError, match=r"No permission to write .*run\.dir=FOLDER"), atomic_write(tmp_path / "file"):
        raise OSError(number, "refused")


def test_another_error_keeps_its_name(tmp_path):
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "file"):
        raise IsADirectoryError(errno.EISDIR, "is a directory")


def test_json_goes_there_and_back_and_damage_is_named(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"b": [1, None], "a": "ü"})
    assert read_json(path) == {"b": [1, None], "a": "ü"}
    path.write_text(path.read_text()[:-5])
    with pytest.raises(UserError, match=r"value\.json is not valid JSON.*Remove it"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"value\.json is not valid JSON.*Remove it"):
        read_json(path)
    (tmp_path / "DONE").touch()  # of a stage, which is skipped while that is there
    with pytest.raises(UserError, match=rf"value\.json is not valid JSON.*Remove the folder {tmp_path} and give the same"):
        read_json(path)
    with pytest.raises(UserError, match=r"There is no file .*other\.json"):
        read_json(tmp_path / "other.json")


def test_json_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(UserError, match=r"run\.json cannot be read \(Permission denied\)\. Make it readable"):
        read_json(tmp_path / "run.json")


def test_a_digest_of_what_cannot_be_read(tmp_path, monkeypatch):
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "data.csv", "No such file or directory")):
        with pytest.raises(UserError, match=rf"{path} cannot be read \({reason}\)\. Make it a file that you may read"):
            sha256(path)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "data.csv").touch()
    monkeypatch.setattr("hashlib.file_digest", refuse)
    with pytest.raises(UserError, match=r"data\.csv cannot be read \(Permission denied\)\. Make it"):
        sha256(tmp_path / "data.csv")


def test_what_a_library_cannot_read_names_the_folder_to_remove(tmp_path):
    path = tmp_path / "groups.npz"
    for content in (None, b"", b"PK\x03\x04 and no more"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=rf"groups\.npz cannot be read \(.+\)\. Remove the folder {tmp_path} and give"):
            Evaluated({}, None, tmp_path).groups  # noqa: B018


def test_digests(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    assert len(digest([])) == 12
