"""Text vectors by two processes: those of one, also after the loss of one in the middle."""

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from commands import TORCHRUN, start, until, workers
from runs import logged, strays
from tiny import arguments, by_name, small
from tiny_text import save_data, save_model

from lit_llmers.processes.locks import RECORDS
from lit_llmers.running import run
from lit_llmers.signals import SignalReader
from lit_llmers.stages import Stage

ITEMS, USERS = 600, 100  # so many texts that there is time to strike
RECIPE = """\
# For tests.
defaults: [/base, /data: local, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  text:
    encode: transformer
    model: MODEL
    fields: [title, categories]
    missing: zero
    max_tokens: 16
    batch_size: 1   # no text has another beside it, so the bits are the same whoever encodes it
    reduce: 8
    users: history
  said: {encode: said, model: "${teacher}", dim: 6, fields: [title], missing: zero, vocabulary: 400, trainer: {batch_size: 64}}
"""
TWO = ["stages.text.trainer={devices: 2, accelerator: cpu}", "stages.said.trainer.devices=2"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The recipe, and overrides of it."""
    root = tmp_path_factory.mktemp("given")
    save_data(root / "set", ITEMS, USERS)
    recipe = root / "mine.yaml"
    recipe.write_text(RECIPE.replace("MODEL", str(save_model("bert", root / "bert"))))
    return str(recipe), [f"data.path={root / 'set'}", "trainer.max_epochs=1"]


@pytest.fixture(scope="module")
def one(tmp_path_factory, given) -> dict[str, Stage]:
    recipe, overrides = given
    stages = by_name(small(tmp_path_factory.mktemp("one"), *overrides, recipe=recipe))
    run(list(stages.values()), None)
    return stages


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory, given) -> tuple[dict[str, Stage], str]:
    """Two processes of which one was killed, then the same brought to their end by torchrun; and what these said."""
    recipe, overrides = given
    folder = tmp_path_factory.mktemp("two")
    command = [f"recipe={recipe}", *arguments(folder, *overrides, *TWO, recipe=recipe)]
    stages = by_name(small(folder, *overrides, *TWO, recipe=recipe))

    process = start(*command)
    until(process, r"text +\d+ of \d+ texts")
    os.kill(workers(process)[1], signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1, said
    assert "Stage 'text': rank 1 of 2 was killed by SIGKILL" in said
    assert 0 < len(shards(stages["text"].run.folder)) < ITEMS / 32, "in the middle"

    process = start(*command, launcher=TORCHRUN)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == 0, said
    return stages, said


def shards(run_folder: Path) -> list[Path]:
    return list((run_folder / RECORDS).rglob("shard-*.npy"))


@pytest.mark.parametrize("table", ["item_table", "user_table"])
def test_items_and_users_have_the_vectors_of_one_process(one, disturbed, table):
    ours, theirs = (stages["text"].folder / f"{table}.npy" for stages in (disturbed[0], one))
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_number_of_processes_renames_nothing(one, disturbed):
    assert {name: stage.folder.name for name, stage in disturbed[0].items()} == {
        name: stage.folder.name for name, stage in one.items()
    }


def test_each_process_encodes_shards_of_its_own(one, disturbed):
    """Rank 0 alone speaks, and of its own: here of the users' texts, of which nothing was there."""
    stages, said = disturbed
    users, items = sorted(map(SignalReader, (stages["text"].run.folder / RECORDS).iterdir()), key=len)
    assert USERS / 2 < len(users) <= USERS + 1 < ITEMS / 2 < len(items) < ITEMS, "those that differ"
    rows = users.spec.shards
    assert len(rows) > 6, "so that each has its share"
    spoken = [int(stop) for stop in re.findall(rf"text +(\d+) of {len(users)} texts", said)]
    assert spoken == [shard.stop for shard in rows[::2]]


def test_what_it_cost_counts_all_processes(one, disturbed):
    """Those texts that are cut are all of users, which were encoded in the last start."""
    ours, theirs = disturbed[0]["text"].summary, one["text"].summary
    for key in ("items", "users", "dim", "identity", "cut_texts"):
        assert ours[key] == theirs[key], key
    assert 0 < ours["tokens"] < theirs["tokens"]
    assert ours["cut_texts"] > USERS / 4


def test_said_by_two_processes_learns_what_one_does(one, disturbed):
    ours, theirs = (stages["said"] for stages in (disturbed[0], one))
    tables = [np.load(stage.folder / "item_table.npy") for stage in (ours, theirs)]
    np.testing.assert_allclose(*tables, rtol=1e-3, atol=1e-4)
    losses = [[entry["loss"] for entry in logged(stage, "loss").values()] for stage in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert ours.summary["epochs"] == theirs.summary["epochs"]


def test_nothing_is_left_lying_about(disturbed):
    assert not strays(disturbed[0]["text"].run.folder)
