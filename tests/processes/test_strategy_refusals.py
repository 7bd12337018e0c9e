"""What a strategy cannot do is said before anything starts; `tests/cluster` runs them."""

import importlib.util
import json

import pytest
import torch
from tiny import BASE, by_name, small

from lit_llmers.callbacks.resume import LastCheckpoint
from lit_llmers.conf.encoding import ContrastConfig, EncodeStage
from lit_llmers.conf.schema import TrainerConfig
from lit_llmers.errors import UserError
from lit_llmers.files import previous, recover, replace_folder
from lit_llmers.processes import strategies
from lit_llmers.teachers.base import BaseConfig, load_base, without_weights

DDP = ["trainer.strategy=ddp", "trainer.devices=2"]
MEAN_WEIGHT = "stages.student.callbacks=[{ranking_distillation:{from:lists,loss:bce,dros:1.0,official_dros_mean:true}}]"


def settings(strategy: str, **given) -> TrainerConfig:
    return TrainerConfig(strategy=strategy, devices=1 if strategy == "auto" else 2, **given)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("student", [*DDP, "student=cl4srec"], "sequence_contrast puts all rows of a batch beside each other.*of 2 processes"),
        ("dllm2rec", [*DDP, MEAN_WEIGHT], "ranking_distillation puts all rows of a batch beside each other.*of 2 processes"),
        ("student", [*DDP, "student=bpr-mf", "stages.student.model.sparse=true"], "model.sparse=true trains in one process"),
        ("student", ["stages.student.trainer={strategy: zero3, devices: 2}"], "no language model that.*zero3 could cut up"),
        ("slmrec", ["trainer.strategy=zero3", "trainer.devices=2", "teacher.dtype=bfloat16"], "the base's are bfloat16"),
        ("slmrec", ["trainer.strategy=fsdp2", "trainer.devices=2", "trainer.compile=true"], "trainer.compile does not go with"),
        ("bigrec", ["trainer.strategy=fsdp2", "trainer.devices=2", "stages.teacher.validate=ranking"], "Use validate: loss"),
        ("slmrec", [*DDP, "trainer.batch_size=15"], "cannot be divided by 2"),
    ],
)
def test_what_does_not_go_together_is_named_when_the_recipe_is_planned(tmp_path, recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        small(tmp_path, *overrides, recipe=recipe)


def test_dros_by_each_targets_own_weights_goes_with_any_number_of_processes(tmp_path):
    own = MEAN_WEIGHT.replace(",official_dros_mean:true", "")
    assert by_name(small(tmp_path, *DDP, own, recipe="dllm2rec"))["student"].processes == 2


def test_an_encode_stage_trains_in_one_process_or_under_ddp():
    said = {"encode": "said", "model": "x"}
    assert EncodeStage(**said, trainer=settings("ddp")).trainer.processes == 2
    with pytest.raises(UserError, match="zero3 does not train an encode stage"):
        EncodeStage(**said, trainer=settings("zero3"))
    with pytest.raises(UserError, match="tfidf is counted by one process, not by 2. Leave trainer out"):
        EncodeStage("tfidf", trainer=settings("ddp"))
    with pytest.raises(UserError, match="contrast of the encode stage puts all rows of a batch beside each other"):
        EncodeStage("transformer", model="x", contrast=ContrastConfig(), trainer=settings("ddp"))


def test_where_and_on_how_many_a_stage_runs_is_no_part_of_its_name(tmp_path):
    one = by_name(small(tmp_path))
    for strategy in ("ddp", "zero2", "zero3", "zero3-offload", "fsdp2"):
        other = by_name(small(tmp_path, f"trainer.strategy={strategy}", "trainer.devices=2"))
        assert {name: stage.fingerprint for name, stage in other.items()} == {n: s.fingerprint for n, s in one.items()}
        assert other["teacher"].processes == 2
        assert other["item_embeddings"].processes == (2 if strategy == "ddp" else 1)


def test_several_devices_are_enough_to_say(tmp_path):
    stages = by_name(small(tmp_path, "trainer.devices=2", "stages.popularity={fit: popularity}"))
    assert (stages["student"].trainer.strategy, stages["student"].processes) == ("ddp", 2)
    assert (stages["popularity"].trainer.strategy, stages["popularity"].processes) == ("auto", 1)  # it is counted


def test_a_missing_package_and_missing_devices_are_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(UserError, match=r"pip install 'lit-llmers\[deepspeed\]'"):
        strategies.check_machine(settings("zero3"))
    with pytest.raises(UserError, match="finds no GPU here"):
        strategies.check_machine(settings("fsdp2", accelerator="cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="more GPUs than the 1 of this machine"):
        strategies.check_machine(settings("ddp"))
    strategies.check_machine(settings("ddp", accelerator="cpu"))


def test_a_base_without_weights_has_the_shapes_and_no_memory():
    """On the processes that are sent theirs; in training mode as elsewhere, for activations are recomputed in it alone."""
    config = BaseConfig.of(BASE)
    real, _ = load_base(config, 2)
    state = torch.get_rng_state()
    with without_weights():
        hollow, _ = load_base(config, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: (value.shape, value.dtype) for name, value in hollow.named_parameters()} == {
        name: (value.shape, value.dtype) for name, value in real.named_parameters()
    }
    assert all(value.is_meta for value in hollow.parameters())
    assert hollow.training
    assert real.training
    assert not any(value.is_meta for value in load_base(config, 2)[0].parameters())


@pytest.mark.parametrize("written", ["auto", "ddp", "zero3"])
@pytest.mark.parametrize("wanted", ["auto", "ddp", "zero3", "fsdp2"])
def test_a_checkpoint_of_another_strategy_is_refused(tmp_path, written, wanted):
    path = tmp_path / "last.ckpt"
    about = LastCheckpoint(path, "abc", settings(written)).about
    if written == "zero3":
        path.mkdir()
        (path / "about.json").write_text(json.dumps(about))
    else:
        torch.save(about, path)
    last = LastCheckpoint(path, "abc", settings(wanted))

    def load():
        assert last.found() == str(path)

    if written == wanted:
        load()
        last = LastCheckpoint(path, "xyz", settings(wanted))
        with pytest.raises(UserError, match="checkpoint of another model"):
            load()
    else:
        with pytest.raises(UserError, match=f"trainer.strategy={written} on .*Go on as it was begun, or remove"):
            load()


def test_a_checkpoint_of_before_there_were_strategies_is_of_one_process(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"stage": "abc"}, path)
    assert LastCheckpoint(path, "abc", settings("auto")).found() == str(path)


def test_no_moment_is_without_a_checkpoint_folder(tmp_path):
    """However far a killed process came with putting a new folder in place of the old one."""
    path = tmp_path / "last.ckpt"

    def folder(place, content):
        place.mkdir()
        (place / "x").write_text(content)
        return place

    replace_folder(folder(tmp_path / "new", "1"), path)
    replace_folder(folder(tmp_path / "new", "2"), path)
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    path.rename(previous(path))  # killed after the first renaming
    recover(path)
    assert (path / "x").read_text() == "2"
    folder(previous(path), "1")  # killed before the old one was removed
    recover(path)
    assert (path / "x").read_text() == "2"
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
