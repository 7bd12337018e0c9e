"""`metrics.jsonl`: one JSON object per logged step, appended as training goes, whole whenever it is read."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from lit_llmers.errors import UserError


class Journal:
    """Appends lines to a file such as a `metrics.jsonl` and flushes each one.

    A line that a killed process left half-written is cut off when the file is opened. A line that cannot be written
    whole is taken back before the error is raised.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file: IO[bytes] | None = None

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line. Tensors and NumPy scalars become numbers; NaN and infinities, which JSON lacks, become null.

        Raises:
            UserError: the disk is full or the file may not be written.
        """
        line = json.dumps({key: _plain(value) for key, value in values.items()}, allow_nan=False) + "\n"
        try:
            if self._file is None:
                self._file = self._open()
            self._write(line.encode())
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}). Mend that and give the same command again: "
                "it goes on where it was."
            ) from error

    def _open(self) -> IO[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        return file

    def _write(self, line: bytes) -> None:
        assert self._file is not None
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):  # a raw file may take a part only, as it does when the disk fills
                written += self._file.write(line[written:])
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a `metrics.jsonl`, one dict per step, in order of the steps; see `read_journal`.

    A resumed run logs again what it had logged after its last checkpoint: lines of the same step are merged and the
    later value wins.

    Raises:
        UserError: a line before the last is not JSON.
    """
    steps: dict[int, dict[str, Any]] = {}
    for entry in read_journal(path):
        steps.setdefault(int(entry["step"]), {}).update(entry)
    return [steps[step] for step in sorted(steps)]


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Read what a `Journal` wrote, in order. A torn last line is left out. A file that is not there is an empty one.

    Raises:
        UserError: a line before the last is not JSON.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    entries = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or torn
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"Line {number} of {path} is not JSON ({error}). Remove that line.") from error
    return entries
