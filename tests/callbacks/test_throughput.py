"""The peak of the memory is the training's own, and it is logged with the speed at the end of every epoch."""

import mmap

import pytest
import torch
from tiny import by_name, small

from lit_llmers.callbacks import throughput
from lit_llmers.callbacks.throughput import peak_memory, start_peak
from lit_llmers.journal import read_metrics
from lit_llmers.running import run

CPU = torch.device("cpu")
MB = 1 << 20
linux = pytest.mark.skipif(not (throughput.PROCESS / "clear_refs").exists(), reason="the system does not say")


def resident(size: int) -> mmap.mmap:
    """Memory that is really in use."""
    block = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        block[page] = 1
    return block


@linux
def test_the_peak_forgets_what_was_before_and_sees_what_came_after():
    with resident(400 * MB):
        assert peak_memory(CPU) > 400 * MB
    high = peak_memory(CPU)
    start_peak(CPU)
    low = peak_memory(CPU)
    assert low < high - 300 * MB
    resident(100 * MB).close()
    assert 80 * MB < peak_memory(CPU) - low < 150 * MB


def test_a_system_that_does_not_say(monkeypatch, tmp_path):
    monkeypatch.setattr(throughput, "PROCESS", tmp_path / "nowhere")
    start_peak(CPU)
    assert peak_memory(CPU) is None


@linux
def test_every_epoch_logs_speed_and_memory(tmp_path):
    planned = small(tmp_path, recipe="student")
    run(planned, "student")
    stage = by_name(planned)["student"]
    logged = [entry for entry in read_metrics(stage.folder / "metrics.jsonl") if "rows_per_second" in entry]
    assert len(logged) == stage.summary["epochs"]
    peaks = [entry["peak_memory_gb"] for entry in logged]
    assert peaks == sorted(peaks)
    assert 0.05 < peaks[0] < 20
