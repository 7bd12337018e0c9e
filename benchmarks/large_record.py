"""Writes and reads a teacher's record that is larger than the memory this process may have.

`python benchmarks/large_record.py FOLDER` prints one JSON line. The kernel's limit on private memory (RLIMIT_DATA: heap
and private mappings; the pages of a file that is mapped are not among them, for the kernel takes those back at will) is
set below the record's size and tried first: an array of that size must be refused.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch

from lit_llmers.signals import SignalReader, SignalSpec, SignalWriter

ROWS, SHAPE = 20_000, (4, 4096)  # 4 blocks of a 7B model
LIMIT = 400 * 2**20
WRITTEN, READ = 512, 128  # rows at a time: a teacher's batch, a student's


def main(folder: Path) -> None:
    """Write, read back in random order, check every row, and print what it took."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    spec = SignalSpec("block_states", ROWS, SHAPE, "float16", teacher="none", split="none")
    size = ROWS * int(np.prod(SHAPE)) * 2
    try:
        np.ones(size, np.uint8)
    except MemoryError:
        pass
    else:
        raise SystemExit(f"The limit of {LIMIT} bytes does not hold on this system: {size} bytes could be had.")

    started = time.perf_counter()
    _write(SignalWriter(folder, spec))
    written = time.perf_counter() - started
    private = _status("RssAnon")
    reader = SignalReader(folder)
    started = time.perf_counter()
    order = np.random.default_rng(0).permutation(ROWS)
    for start in range(0, ROWS, READ):
        rows = order[start : start + READ]
        if not torch.equal(reader[rows][:, 0, 0], _mark(rows).half()):
            raise SystemExit("The record does not give back what was written.")
    read = time.perf_counter() - started
    result = {
        "rows": ROWS,
        "shape": SHAPE,
        "bytes": sum(path.stat().st_size for path in folder.glob("*.npy")),
        "limit_bytes": LIMIT,
        "private_bytes": max(private, _status("RssAnon")),
        "resident_bytes": _status("VmHWM"),  # ru_maxrss would count the parent's memory too
        "written_rows_per_second": ROWS / written,
        "read_rows_per_second": ROWS / read,
    }
    print(json.dumps(result))


def _write(writer: SignalWriter) -> None:
    values = torch.randn(WRITTEN, *SHAPE, generator=torch.Generator().manual_seed(0))
    for rows in writer.missing():
        with writer.shard(rows) as shard:
            for start in range(rows.start, rows.stop, WRITTEN):
                chosen = np.arange(start, min(start + WRITTEN, rows.stop))
                values[: len(chosen), 0, 0] = _mark(chosen)
                shard.write(chosen, values[: len(chosen)])
    writer.finish()


def _mark(rows: np.ndarray) -> torch.Tensor:
    """A number that tells rows apart and that fp16 holds exactly."""
    return torch.from_numpy(rows % 2048).float()


def _status(field: str) -> int:
    """Bytes under a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the record is written, 655 MB; it is not removed")
    main(parser.parse_args().folder)
