"""A folder that one process at a time works in, and what a killed one left half-written there."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from lit_llmers.errors import UserError
from lit_llmers.files import remove
from lit_llmers.preemption import stop_if_asked

LOCK = ".lock"
RECORDS = "encoded"  # folder of a run with what language models made of texts: each folder in it is held by itself
SHORT = 1.0  # seconds that are waited for without a word
OF_THE_RUN = ((), ("plots",), ("report",))  # written by whoever holds the run's folder; all others are a stage's

log = logging.getLogger(__name__)


class Busy(UserError):
    """Another process holds the folder."""


@contextmanager
def alone(folder: Path, *, patience: float = 0, deep: bool = True) -> Iterator[None]:
    """Hold a folder for this process, and remove what a killed one left half-written.

    The lock is the system's, on a file that is there as long as the folder is held: it goes with the process, however that
    ends. Where the folder is a link whose target is gone, as after a run of a comparison was moved, a new one takes its place.

    Args:
        patience: seconds to wait for another process.
        deep: clean the folders in it too.

    Raises:
        UserError: the folder may not be written.
        Busy: another process works in it.
        Stopped: this process was asked to stop while it waited.
    """
    began = time.monotonic()
    silent = patience > 0
    try:
        if folder.is_symlink() and not folder.exists():
            folder.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        while (lock := _take(folder / LOCK)) is None:
            waited = time.monotonic() - began
            if waited >= patience:
                raise Busy(f"Another process is working in {folder}. Wait for it, or start a second run with run.name=OTHER.")
            if silent and waited > SHORT:
                log.info("Another process is working in %s: waiting for it, %d s at most", folder, patience)
                silent = False
            stop_if_asked()
            time.sleep(0.05)
    except OSError as error:
        raise UserError(
            f"The run folder {folder} cannot be written ({error.strerror}). Choose another with run.dir=FOLDER."
        ) from error
    with lock:
        try:
            for leftover in list(_leftovers(folder) if deep else folder.glob(".*.tmp")):
                remove(leftover)
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # while it is held: nobody else's is removed


def _take(path: Path) -> IO[str] | None:
    """The lock file, open and locked, or None where another process has it."""
    import fcntl

    lock = open(path, "w")  # noqa: SIM115  (closing it gives the lock up)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):  # the second: whoever held it has removed it since it was opened
        pass
    except OSError:
        lock.close()
        raise
    lock.close()
    return None


def sweep(run_folder: Path) -> None:
    """Remove what killed processes left half-written anywhere in a run, except where somebody works."""
    for leftover in list(_leftovers(run_folder)):
        place = leftover.relative_to(run_folder).parts[:-1]
        if place[:1] == (RECORDS,):
            holder = run_folder.joinpath(*place[:2])
        else:
            holder = run_folder if place[:1] in OF_THE_RUN else run_folder / place[0]
        try:
            with alone(holder, deep=holder != run_folder):
                remove(leftover)
        except Busy:
            continue


def _leftovers(folder: Path) -> Iterator[Path]:
    """All that is called so in a folder, where others work: one that they remove meanwhile has none."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in (*folders, *files) if fnmatch(name, ".*.tmp"))
