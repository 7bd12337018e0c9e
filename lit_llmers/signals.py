"""What a teacher says, on disk: one array of fixed-size rows, cut into memory-mapped shards with checksums.

A folder holds `spec.json` (what is being recorded), `shard-00000.npy` and so on, `shard-00000.json` beside each whole
shard, and at last `manifest.json`. A shard is either whole or absent, so an interrupted recording goes on at the first
missing shard. Neither writing nor reading ever needs a shard in memory, and nothing here is a pickle.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_llmers.errors import UserError, unknown
from lit_llmers.files import atomic_write, digest, read_json, sha256, write_json

FORMAT_VERSION = 1
DTYPES = {"float16": torch.float16, "float32": torch.float32, "int32": torch.int32}
MANIFEST = "manifest.json"  # of a record that is whole
SHARD_BYTES = 128 * 2**20
SHARD_BATCHES = 32  # of what is asked of a model: the most that an interrupted pass loses
SHARDS_EACH = 4  # of a process among several, at least, as far as there are rows


def shard_rows(folder: Path, rows: int, most: int, world: int, said: int | None = None) -> int:
    """Rows of a shard of the record in `folder`: as it was begun, else as `said`, `most`, or fewer for each process."""
    begun = folder / "spec.json"
    if begun.is_file():
        return int(read_json(begun)["rows_per_shard"])
    if said is not None:
        return said
    return max(1, min(most, rows if world == 1 else -(-rows // (SHARDS_EACH * world))))


@dataclass(frozen=True)
class SignalSpec:
    """What a record holds.

    Attributes:
        name: of the signal, for example `block_states`.
        rows: number of training targets, the record's keys 0..rows-1.
        shape: of one row, for example `(4, 64)`.
        dtype: on disk: `float16`, `float32` or `int32`.
        teacher, split: fingerprints of the teacher and of the training rows.
        rows_per_shard: rows in one file; None makes files of about 128 MB.
    """

    name: str
    rows: int
    shape: tuple[int, ...]
    dtype: str
    teacher: str
    split: str
    rows_per_shard: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise unknown("dtype (signals.dtype)", self.dtype, DTYPES)
        if self.rows < 1 or min(self.shape, default=1) < 1:
            raise UserError(f"There is nothing to record: {self.rows} rows of shape {list(self.shape)}. Look at the data.")
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.rows_per_shard is None:
            row_bytes = math.prod(self.shape) * np.dtype(self.dtype).itemsize
            object.__setattr__(self, "rows_per_shard", min(self.rows, max(1, SHARD_BYTES // row_bytes)))
        elif self.rows_per_shard < 1:
            raise UserError(f"signals.shard_rows is {self.rows_per_shard}. It must be 1 or more, or null.")

    @property
    def shards(self) -> list[range]:
        """The rows of each shard, in order."""
        size = self.rows_per_shard
        assert size is not None
        return [range(start, min(start + size, self.rows)) for start in range(0, self.rows, size)]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self), "shape": list(self.shape)}


class SignalWriter:
    """Records a signal shard by shard and goes on where an interrupted recording stopped.

        writer = SignalWriter(folder, spec)
        for rows in writer.missing():
            with writer.shard(rows) as shard:
                shard.write(indices, values)  # in any order, until all of `rows` are there
        writer.finish()

    Several processes may fill different shards of one folder; one of them calls `finish` when all are done.

    Raises:
        UserError: the folder holds another record or may not be written.
    """

    def __init__(self, folder: Path, spec: SignalSpec) -> None:
        self.folder, self.spec = Path(folder), spec
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except PermissionError as error:
            raise UserError(f"No permission to make {folder}. Choose another folder with run.dir=FOLDER.") from error
        begun, wanted = self.folder / "spec.json", spec.to_json()
        if begun.exists():
            found = read_json(begun)
            other = [key for key in wanted if found.get(key) != wanted[key]]
            if other:
                key = other[0]
                raise UserError(
                    f"{self.folder} holds another record: its {key} is {found.get(key)}, not {wanted[key]}. Remove the "
                    "folder to record anew."
                )
        else:
            write_json(begun, wanted)

    def missing(self, rank: int = 0, world: int = 1) -> list[range]:
        """The rows of every shard that is not yet whole, in order; of those that one of `world` processes is to fill."""
        numbers = range(rank, len(self.spec.shards), world)
        return [self.spec.shards[number] for number in numbers if self._sidecar(number) is None]

    @contextmanager
    def shard(self, rows: range) -> Iterator["Shard"]:
        """Fill the shard with these rows; it appears in the folder when the block ends without an error.

        Raises:
            UserError: the disk is full or a value does not fit the record. No half-written shard stays.
            RuntimeError: the block ended with rows unwritten.
        """
        number = self.spec.shards.index(rows)
        path = self._path(number)
        for stale in self.folder.glob(f".{path.stem}.*.tmp"):  # of a process that was killed
            stale.unlink()
        with atomic_write(path) as temporary:
            shape = (len(rows), *self.spec.shape)
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=self.spec.dtype, shape=shape)
            _reserve(temporary)
            shard = Shard(array, rows, self.spec)
            yield shard
            if not shard.written.all():
                raise RuntimeError(f"row {rows.start + int(shard.written.argmin())} of {path} was not written")
            array.flush()
            del array, shard.array
            checksum, size = sha256(temporary), temporary.stat().st_size
        entry = {"file": path.name, "rows": len(rows), "bytes": size, "sha256": checksum, "spec": self._digest}
        write_json(path.with_suffix(".json"), entry)

    def finish(self) -> None:
        """Write the manifest, which declares the record whole.

        Raises:
            RuntimeError: a shard is missing.
        """
        entries = [self._sidecar(number) for number in range(len(self.spec.shards))]
        if None in entries:
            raise RuntimeError(f"shard {entries.index(None)} of {self.folder} is missing")
        listed = [{key: entry[key] for key in ("file", "rows", "bytes", "sha256")} for entry in entries if entry]
        write_json(self.folder / MANIFEST, self.spec.to_json() | {"shards": listed})

    @property
    def _digest(self) -> str:
        return digest(self.spec.to_json())

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.npy"

    def _sidecar(self, number: int) -> dict[str, Any] | None:
        """The entry of a shard that is whole, else None."""
        path = self._path(number)
        if not path.exists() or not path.with_suffix(".json").exists():
            return None
        entry = read_json(path.with_suffix(".json"))
        return entry if entry["spec"] == self._digest and path.stat().st_size == entry["bytes"] else None


class Shard:
    """An open shard: `write` puts rows where they belong. Made by `SignalWriter.shard`."""

    def __init__(self, array: np.ndarray, rows: range, spec: SignalSpec) -> None:
        self.array, self.rows, self.spec = array, rows, spec
        self.written = np.zeros(len(rows), dtype=bool)

    def write(self, rows: np.ndarray | Tensor, values: Tensor | np.ndarray) -> None:
        """Put `values` `[T, *shape]` at the rows `[T]` of the record.

        Raises:
            UserError: a value is NaN, infinite or too large for the record's dtype.
            ValueError: a row is not of this shard, or the shapes or kinds of number do not fit.
        """
        index = np.asarray(rows) - self.rows.start
        values = torch.as_tensor(values).detach()
        if tuple(values.shape) != (len(index), *self.spec.shape):
            raise ValueError(f"values of shape {list(values.shape)} for {len(index)} rows of shape {list(self.spec.shape)}")
        if index.size and not 0 <= index.min() <= index.max() < len(self.rows):
            raise ValueError(f"a row lies outside of the shard's rows {self.rows.start}..{self.rows.stop - 1}")
        if values.is_floating_point() != self.spec.torch_dtype.is_floating_point:
            raise ValueError(f"values of {values.dtype} for a record of {self.spec.dtype}")
        stored = values.to(self.spec.torch_dtype)
        wrong = (stored != values) if self.spec.dtype == "int32" else ~torch.isfinite(stored)
        if wrong.any():
            raise self._misfit(values, wrong, index + self.rows.start)
        self.array[index] = stored.cpu().numpy()
        self.written[index] = True

    def _misfit(self, values: Tensor, wrong: Tensor, rows: np.ndarray) -> UserError:
        place = tuple(wrong.nonzero()[0].tolist())
        value = values[place].item()
        cause = f"The teacher says {value:.6g} at row {rows[place[0]]}, place {list(place[1:])} of '{self.spec.name}'"
        if not math.isfinite(value):
            return UserError(
                f"{cause}: its training diverged, or it overflows at this precision. Train it with a lower "
                "optimizer.lr or trainer.precision=32-true, then record again."
            )
        return UserError(f"{cause}, which does not fit {self.spec.dtype}. Record with signals.dtype=float32.")


class SignalReader:
    """A finished record: `reader[rows]` gathers rows from memory maps.

    Args:
        folder: of the record.
        teacher: fingerprint of the teacher that it must be of; None accepts any.
        split: fingerprint of the training rows that it must be of; None accepts any.
        rows: number of rows that it must have; None accepts any.
        verify: compare every shard's SHA-256 with the manifest's (about a second for each GB); sizes always are.
        remove: the folder to remove to have the record made again; None is the stage's, in which it lies.

    Attributes:
        spec: the record's `SignalSpec`.

    Raises:
        UserError: the record is missing, unfinished, damaged, or of another format version, teacher or split.
    """

    def __init__(
        self,
        folder: Path,
        *,
        teacher: str | None = None,
        split: str | None = None,
        rows: int | None = None,
        verify: bool = True,
        remove: Path | None = None,
    ) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.exists():
            state = "is unfinished (it has no manifest.json)" if self.folder.is_dir() else "does not exist"
            raise UserError(f"The teacher's record {self.folder} {state}. Run the stage that records it to its end first.")
        manifest = read_json(path)
        removed = remove.resolve() if remove else self.folder.resolve().parent
        cure = f"Remove {removed} and run the stage that records it again."
        self._expect("format version", manifest.pop("format_version", None), FORMAT_VERSION, cure)
        self._shards = manifest.pop("shards")
        self.spec = SignalSpec(**manifest)
        found = (("teacher", self.spec.teacher, teacher), ("split", self.spec.split, split))
        for what, value, wanted in (*found, ("number of rows", self.spec.rows, rows)):
            if wanted is not None:
                self._expect(what, value, wanted, cure)
        for entry in self._shards:
            self._check(entry, verify, cure)
        self._shard_rows = len(self.spec.shards[0])
        self._maps: list[np.ndarray] | None = None

    def _expect(self, what: str, found: Any, wanted: Any, cure: str) -> None:
        if found != wanted:
            raise UserError(f"The teacher's record {self.folder} is of another {what}: {found} instead of {wanted}. {cure}")

    def _check(self, entry: dict[str, Any], verify: bool, cure: str) -> None:
        path = self.folder / entry["file"]
        if not path.exists():
            raise UserError(f"The shard {path} is missing. {cure}")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UserError(f"The shard {path} is damaged: it has {size} bytes instead of {entry['bytes']}. {cure}")
        if verify and sha256(path) != entry["sha256"]:
            raise UserError(f"The shard {path} was altered: its SHA-256 is not the manifest's. {cure}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.spec.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.spec.torch_dtype

    def __len__(self) -> int:
        return self.spec.rows

    def __getitem__(self, rows: Tensor | np.ndarray) -> Tensor:
        """Rows `[T]`, in any order and repeated at will, to `[T, *shape]` in the record's dtype.

        Raises:
            UserError: a row lies outside of the record.
        """
        index = torch.as_tensor(rows).cpu().numpy().astype(np.int64, copy=False)
        out = torch.empty((len(index), *self.shape), dtype=self.dtype)
        if not len(index):
            return out
        if not 0 <= index.min() <= index.max() < len(self):
            raise UserError(
                f"Rows {index.min()}..{index.max()} are asked of the teacher's record {self.folder}, which has rows "
                f"0..{len(self) - 1}. It was recorded for other training rows: run the stage that records it again."
            )
        if self._maps is None:
            files = (self.folder / entry["file"] for entry in self._shards)
            self._maps = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
        target = out.numpy()
        number, within = np.divmod(index, self._shard_rows)
        for shard in np.unique(number):
            chosen = np.flatnonzero(number == shard)
            target[chosen] = self._maps[shard][within[chosen]]
        return out

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": None}  # a pickled memory map would carry the whole record


def _reserve(path: Path) -> None:
    """Claim the file's blocks: a full disk raises OSError here; a write to a memory map would kill the process."""
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
