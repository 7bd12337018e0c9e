"""The peak of the memory is the training's own, and it is logged with the speed at the end of every epoch."""

import mmap

import pytest
import torch
from tiny import by_name, random_dataset, small

from lit_llmers.callbacks import throughput
from lit_llmers.callbacks.throughput import Throughput, peak_memory, start_peak
from lit_llmers.conf.schema import SequenceConfig
from lit_llmers.data.loader import TrainingBatches
from lit_llmers.data.pairs import PairBatches, PairRows
from lit_llmers.data.sequences import TrainingRows
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
    logged = [entry for entry in read_metrics(stage.folder / "metrics.jsonl") if "targets_per_second" in entry]
    assert len(logged) == stage.summary["epochs"]
    peaks = [entry["peak_memory_gb"] for entry in logged]
    assert peaks == sorted(peaks)
    assert 0.05 < peaks[0] < 20


@pytest.mark.parametrize("examples", ["last", "prefixes", "sequence", None], ids=str)
@pytest.mark.parametrize("world", [1, 3])
def test_a_target_is_one_whatever_a_row_holds(examples, world):
    data, counted = random_dataset(), [Throughput() for _ in range(world)]
    rows = PairRows(data) if examples is None else TrainingRows(data, SequenceConfig(8, examples))
    for rank, each in enumerate(counted):
        ranks = {"rank": rank, "world": world}
        batches = TrainingBatches(rows, 6, 0, **ranks) if examples else PairBatches(rows, 6, 2, 0, **ranks)
        for batch in batches:
            each.on_train_batch_end(None, None, None, batch, 0)
        assert each.rows == len(rows)
    assert sum(each.targets for each in counted) / world == pytest.approx(rows.targets, rel=0 if world == 1 else 0.1)


def test_targets_that_an_older_version_did_not_count_are_not_guessed():
    throughput = Throughput()
    throughput.load_state_dict({"epochs": 1, "rows": 6, "seconds": 2.0})
    throughput.on_train_batch_end(None, None, None, {"row": torch.arange(4)}, 0)
    assert {*throughput.speed} == {"rows_per_second"}
    assert throughput.rows == 10
