"""Files that are either whole or absent, and the digests that name what is in them."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

from lit_llmers.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place when the block ends, remove it when the block fails.

    Raises:
        UserError: the disk is full or the folder may not be written; nothing half-written stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writable(path):
            yield temporary
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Write `path`, or say why that cannot be.

    Raises:
        UserError: the disk is full or the folder may not be written. PyTorch says that of a sharded checkpoint in a
            `BaseException`.
    """
    try:
        yield
    except BaseException as error:
        if _disk_is_full(error):
            raise UserError(
                f"No space left on the disk while writing {path}. Free some space and give the same command again: "
                "what was finished before stays and is not done again."
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(
                f"No permission to write {path}. Make its folder writable, or give lit_llmers.fit another: run.dir=FOLDER."
            ) from error
        raise


def previous(path: Path) -> Path:
    """Where a folder is while a newer one takes its place."""
    return path.with_name(f"{path.name}.previous")


def replace_folder(temporary: Path, path: Path) -> None:
    """Let a folder that is written whole take the place of `path`, a folder or nothing.

    Renaming puts no folder in the place of a full one, so the old one makes room first; `recover` finds it if nothing follows.
    """
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
    remove(previous(path))
    if path.exists():
        os.replace(path, previous(path))
    os.replace(temporary, path)
    remove(previous(path))


def recover(path: Path) -> None:
    """Undo what a killed `replace_folder` left: the old folder goes where there is no new one."""
    if previous(path).exists() and not path.exists():
        os.replace(previous(path), path)
    remove(previous(path))


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _disk_is_full(error: BaseException) -> bool:
    """Libraries say it in their own ways: numpy without an errno, safetensors in an exception of its own."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or "No space left" in str(error) or "requested and" in str(error)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, may not be read or is not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}). Make it readable, or work in another folder with run.dir=FOLDER."
        ) from error
    except ValueError as error:
        done = next((folder for folder in path.parents[:2] if (folder / "DONE").exists()), None)  # skipped while it is there
        raise UserError(
            f"{path} is not valid JSON ({error}). Remove {f'the folder {done.resolve()}' if done else 'it'} and give the same "
            "command again."
        ) from error


@contextmanager
def readable(path: Path, folder: Path) -> Iterator[None]:
    """Read `path`, an array, a table or a checkpoint, or say which folder to remove: its stage's.

    Raises:
        UserError: what is there is missing or damaged. Libraries say that in many ways.
    """
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, UnpicklingError, BadZipFile) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"{path} cannot be read ({reason}). Remove the folder {folder.resolve()} and give the same command again."
        ) from error


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Make it a file that you may read.") from error


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that name a JSON-able value (keys sorted)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]
