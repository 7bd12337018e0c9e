"""`python -m lit_llmers.plan`: the sizes of what will be built, and the arithmetic on them."""

import json
import subprocess
import sys
import time
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lit_llmers import plan
from lit_llmers.errors import UserError
from lit_llmers.files import write_json
from lit_llmers.planning.bases import architecture
from lit_llmers.planning.cards import CARDS, USABLE, Card
from lit_llmers.planning.data import known_data, stand_in
from lit_llmers.planning.models import encoder
from lit_llmers.planning.rehearsal import pretending, rehearse_training
from lit_llmers.planning.sharing import BUCKET, Sizes, checkpoints, shares, sizes_of
from lit_llmers.teachers.base import BaseConfig

SMALL = ["data.generator.users=120", "data.generator.items=80", "logger=csv"]
STRUCTURE = {"name", "verb", "seeds", "repeated", "folders", "needs", "processes", "devices", "num_nodes", "strategy"}


@cache
def planned(*arguments: str) -> dict[str, Any]:
    return plan.plan(plan.parse(arguments))


def of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(stage for stage in found["stages"] if stage["name"] == name)


# ---- parameters (of every recipe: tests/planned.py) ------------------------------------------------------------------------


def test_lora_counts_two_matrices_for_each_adapted_layer() -> None:
    overrides = ["teacher.lora={rank:4,alpha:8,dropout:0.0,targets:[q_proj,up_proj]}", *SMALL]
    found = planned("recipe=slmrec", *overrides)
    counts = of(found, "teacher")["parameters"]
    adapters = 8 * (4 * (64 + 64) + 4 * (64 + 128))  # of 8 layers: q_proj 64 -> 64, up_proj 64 -> 128
    table = (found["data"]["items"] + 1) * 128  # of the items and their texts, 64 wide each
    projections = (128 * 64 + 64) + 64 * 128
    layers = 8 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert counts["trainable"] == adapters + projections
    assert counts["total"] == adapters + projections + layers + table
    assert counts["item_table"] == table


def test_llama_2_7b_is_planned_in_seconds_without_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.process_time()
    found = planned("recipe=bigrec", "scale=paper", *SMALL)
    assert time.process_time() - started < 30
    counts = of(found, "teacher")["parameters"]
    assert counts["total"] - counts["trainable"] == 6_738_415_616  # as its publisher counts
    assert counts["trainable"] == 32 * 2 * 8 * (4096 + 4096)  # rank 8 on q_proj and v_proj
    assert of(found, "teacher")["fits"]


def test_a_base_without_sizes_is_named_and_the_other_stages_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = planned("recipe=slmrec", "teacher=local", "teacher.path=somebody/their-model", *SMALL)
    teacher = of(found, "teacher")
    assert teacher["memory"] is None
    assert teacher["hours"] is None
    assert "somebody/their-model" in teacher["notes"][0]
    assert of(found, "item_embeddings")["memory"]["peak"] > 0
    assert "teacher" in found["totals"]["unknown"]


def test_a_folder_s_config_of_an_older_version_is_planned(tmp_path) -> None:
    """It may name what its architecture no longer knows, as MiniLM's does; a user's own key would be a mistake."""
    old = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "gradient_checkpointing": False, "head_dim": 4}
    write_json(tmp_path / "config.json", old)
    found = architecture(str(tmp_path))
    assert (found["hidden_size"], found["head_dim"]) == (8, 4), "what only the model's code reads is kept"
    assert "gradient_checkpointing" not in found
    model = encoder(BaseConfig(name="old", path=str(tmp_path)), None, "stages.text")
    assert model.config.hidden_size == 8


# ---- memory ----------------------------------------------------------------------------------------------------------------


SIZES = Sizes(base=14_000_000_000, base_trained=14_000_000_000, trained=7_000_000_000, block=400_000_000, live=2_000_000_000)


@pytest.mark.parametrize(
    ("strategy", "world", "expected"),  # GB of weights, gradients and the optimiser of 7 B parameters in 16 bits
    [
        ("zero2", 16, (14, 14 / 16, 84 / 16)),
        ("zero3", 16, (14 / 16, 14 / 16, 84 / 16)),
        ("zero3", 64, (14 / 64, 14 / 64, 84 / 64)),
    ],
)
def test_zero_divides_as_its_paper_says(strategy: str, world: int, expected: tuple[float, float, float]) -> None:
    held = shares(SIZES, strategy, world)
    assert (held.weights / 1e9, held.gradients / 1e9, held.optimizer / 1e9) == pytest.approx(expected)


def test_offload_leaves_buffers_on_the_device_and_the_rest_in_the_host() -> None:
    held = shares(SIZES, "zero3-offload", 8)
    assert held.weights == held.gradients == held.optimizer == 0
    assert held.gathered == 2 * BUCKET + SIZES.live
    assert held.host / 1e9 == pytest.approx(14 / 8 + 4 * 7 / 8 + 12 * 7 / 8)


def test_copies_are_whole_and_fsdp_divides_what_is_of_the_base() -> None:
    sizes = Sizes(base=4000, base_trained=4000, rest=400, rest_trained=200, trained=1050, block=1000)
    assert shares(sizes, "auto", 1) == shares(sizes, "ddp", 8)
    assert shares(sizes, "ddp", 8).total == 4400 + 4200 + 2 * 4200
    held = shares(sizes, "fsdp2", 4)
    assert (held.weights, held.gradients, held.optimizer) == (400 + 1000, 200 + 1000, 2 * 1200)
    assert held.gathered == 2 * 1000


def test_adapters_leave_gradients_and_state_of_the_base_out() -> None:
    sizes = Sizes(base=14_000, base_trained=80, rest=100, rest_trained=20, trained=25)
    assert shares(sizes, "auto", 1).total == 14_100 + 100 + 200


@pytest.mark.parametrize(
    ("strategy", "best", "last"),  # GB of 7 B parameters in 16 bits, as files of DeepSpeed and Lightning have them
    [("auto", 42, 42), ("ddp", 42, 42), ("fsdp2", 14, 42), ("zero2", 14, 98), ("zero3", 14, 84), ("zero3-offload", 14, 84)],
)
def test_a_sharded_model_leaves_its_weights_alone(strategy: str, best: int, last: int) -> None:
    assert checkpoints(SIZES, strategy) == (best * 10**9, last * 10**9)


def test_a_rehearsal_counts_what_a_linear_layer_keeps() -> None:
    with pretending():
        model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 8, bias=False))
        x = torch.ones(32, 64)
        step = rehearse_training(model, lambda: model(x).sum())
        assert sizes_of(model).weights == 4 * (64 * 128 + 128 * 8)
    assert step.gradients == 4 * (64 * 128 + 128 * 8)
    assert step.kept == 4 * 32 * 128 + 4  # what ReLU gave, and the sum
    assert step.flops == 2 * 32 * (64 * 128 + 128 * 8) * 2 + 2 * 32 * 128 * 8  # forward, weights' and inputs' gradients


def test_gradients_of_a_sparse_table_are_the_rows_of_a_batch() -> None:
    with pretending():
        model = nn.ModuleList([nn.Embedding(1000, 8, sparse=True), nn.Linear(8, 4, bias=False)])
        step = rehearse_training(model, lambda: model[1](model[0](torch.ones(16, dtype=torch.long))).sum())
        held = shares(sizes_of(model), "auto", 1)
    assert step.gradients == held.gradients == 4 * 8 * 4
    assert 4 * 16 * 8 < step.backward - step.gradients < 4 * 1000 * 8
    assert held.optimizer == 2 * (4 * 8 * 4 + 4 * 1000 * 8), "its moments are of the whole table"


def test_recomputed_layers_keep_less_and_compute_more() -> None:
    teacher = of(planned("recipe=slmrec", *SMALL), "teacher")
    recomputed = of(planned("recipe=slmrec", "teacher.gradient_checkpointing=true", *SMALL), "teacher")
    assert recomputed["memory"]["activations"] < 0.3 * teacher["memory"]["activations"]
    assert recomputed["memory"]["activations"] == teacher["memory"]["activations_checkpointed"]
    assert teacher["memory"]["activations"] == recomputed["memory"]["activations_plain"]
    assert 1.15 < recomputed["flops"] / teacher["flops"] < 1.4


@pytest.mark.parametrize(
    ("student", "kind"), [("sasrec", "sampled_softmax"), ("sasrec", "bce"), ("gru4rec", "sampled_softmax"), ("bpr-mf", "bpr")]
)
def test_a_step_in_the_rows_of_its_batch_is_planned(student: str, kind: str) -> None:
    loss = [f"student.loss.kind={kind}", "trainer.gradient_clip_val=null"]
    sparse = "student.model.sparse=true" if student == "bpr-mf" else "+student.model.sparse=true"
    dense = of(planned("recipe=student", f"student={student}", *loss), "student")
    found = planned("recipe=student", f"student={student}", *loss, sparse)
    rows, data = of(found, "student"), found["data"]
    assert rows["memory"]["weights"] == dense["memory"]["weights"]
    tables = 4 * 64 * (data["items"] + 1 + (data["users"] if student == "bpr-mf" else 0))
    assert rows["memory"]["gradients"] == dense["memory"]["gradients"] - tables
    assert rows["memory"]["optimizer"] == dense["memory"]["optimizer"]
    assert rows["memory"]["activations"] > 0
    if kind == "sampled_softmax":  # the others' dense scores are no matrix products: see `list_scores`, `pair_dots`
        assert rows["flops"] == pytest.approx(dense["flops"], rel=0.01)
    if kind == "bce":
        assert dense["memory"]["activations"] < 0.5 * rows["memory"]["activations"]


@pytest.mark.parametrize("student", ["sgl", "simgcl", "mixgcf", "lightgcn"])
def test_what_trains_on_a_graph_is_planned(student: str) -> None:
    found = of(planned("recipe=student", f"student={student}", *SMALL), "student")
    assert found["memory"]["activations"] > 0
    assert found["flops"] > 0
    assert found["fits"]


def test_a_deep_model_drawn_from_its_first_layers_is_the_deep_model(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = of(planned("recipe=slmrec", *SMALL), "teacher")
    monkeypatch.setattr("lit_llmers.planning.steps.SOME", 100)
    whole = of(planned.__wrapped__("recipe=slmrec", *SMALL), "teacher")
    assert drawn["memory"]["peak"] == pytest.approx(whole["memory"]["peak"], rel=0.02)
    assert drawn["flops"] == pytest.approx(whole["flops"], rel=0.01)


def test_what_trains_is_planned_in_float32_and_what_serves_in_its_own_type() -> None:
    half = ["teacher.dtype=bfloat16", "trainer.precision=bf16-mixed", *SMALL]
    full, whole = (planned("recipe=slmrec", *half, f"trainer={trainer}") for trainer in ("single", "zero3"))
    lora = planned("recipe=slmrec", *half, "teacher.lora={rank:4,alpha:8,dropout:0.0,targets:[q_proj]}")
    float32 = planned("recipe=slmrec", "trainer.precision=bf16-mixed", *SMALL)
    counts = of(full, "teacher")["parameters"]
    base = counts["trainable"] - (128 * 64 + 64) - 64 * 128
    for name in ("weights", "gradients", "optimizer", "activations", "peak"):
        assert of(full, "teacher")["memory"][name] == of(float32, "teacher")["memory"][name]
    assert of(full, "teacher")["memory"]["gradients"] == 4 * counts["trainable"]
    assert of(full, "teacher")["memory"]["optimizer"] == 8 * counts["trainable"]
    assert of(float32, "teacher")["memory"]["weights"] - of(lora, "teacher")["memory"]["weights"] == 2 * base - 4 * 8 * 4 * 128
    own = counts["trainable"] // of(whole, "teacher")["processes"]
    assert of(whole, "teacher")["memory"]["gradients"] == 2 * own, "DeepSpeed has float32 weights of its own"
    assert of(whole, "teacher")["memory"]["optimizer"] == 12 * own
    assert of(float32, "signals")["memory"]["weights"] - of(full, "signals")["memory"]["weights"] == 2 * base
    assert of(whole, "signals")["memory"]["weights"] == of(full, "signals")["memory"]["weights"]


def test_a_batch_is_divided_among_processes() -> None:
    one = of(planned("recipe=slmrec", *SMALL), "teacher")
    four = of(planned("recipe=slmrec", "trainer=ddp", "trainer.devices=4", *SMALL), "teacher")
    assert four["memory"]["activations"] == pytest.approx(one["memory"]["activations"] / 4, rel=0.1)
    assert four["flops"] == pytest.approx(one["flops"], rel=0.1)


def test_an_online_teacher_is_on_its_students_device() -> None:
    shallow = ["stages.student.model.layers=4", "trainer.batch_size=64", *SMALL]
    recorded = planned("recipe=slmrec", "signals.dtype=float32", *shallow)
    online = planned("recipe=slmrec", "signals.online=true", *shallow)
    teacher, record, student = of(recorded, "signals"), of(online, "signals"), of(online, "student")
    weights = teacher["memory"]["weights"]
    assert student["memory"]["weights"] - of(recorded, "student")["memory"]["weights"] == weights
    assert student["memory"]["peak"] - of(recorded, "student")["memory"]["peak"] == weights
    asked = student["flops"] - of(recorded, "student")["flops"]
    rows = student["epochs"] * student["steps"] * 64 / online["data"]["users"]  # for each that is recorded
    assert asked == pytest.approx(rows * teacher["flops"])
    assert student["hours"] > of(recorded, "student")["hours"]
    assert (record["accelerated"], record["processes"], record["hours"], record["disk"]) == (False, 1, None, None)
    assert "signals" not in online["totals"]["unknown"]


def test_a_teacher_that_takes_more_than_its_student_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CARDS, "tiny", Card(4, 100, 10, 100, "none"))
    small = ["stages.student.model.layers=1", "stages.student.callbacks=[{feature_distillation:{from:signals}}]"]
    wide = [*small, "stages.signals.blocks=1", "teacher.gradient_checkpointing=true", *SMALL]
    recorded = planned("recipe=slmrec", "scale=paper", *wide)
    online = of(planned("recipe=slmrec", "scale=paper", "signals.online=true", "gpu=tiny", *wide), "student")
    assert "signals.online=false" in online["verdict"]
    beyond = online["memory"]["peak"] - of(recorded, "student")["memory"]["peak"]
    assert beyond >= of(recorded, "signals")["memory"]["weights"]


def test_titles_and_the_base_that_embeds_them_stand_beside_a_tuned_model() -> None:
    def beside(embedder: str, *overrides: str) -> tuple[int, int, int]:
        found = planned("recipe=bigrec", "stage=lists", f"stages.teacher.generation.embedder={embedder}", *overrides, *SMALL)
        model = 4 * of(found, "teacher")["parameters"]["total"]
        return of(found, "lists")["memory"]["weights"] - model, model, found["data"]["items"]

    tables, model, items = beside("tuned")
    assert tables > 8 * (items + 1) * (64 + 2), "in 64 bits"
    assert beside("base")[0] == pytest.approx(tables + model, rel=0.01)
    adapters = "teacher.lora={rank:4,alpha:8,dropout:0.0,targets:[q_proj]}"
    assert beside("base", adapters)[0] == pytest.approx(tables, rel=0.01), "which are turned off"


def test_a_model_is_tuned_with_its_validation() -> None:
    def teacher(validate: str, *overrides: str) -> dict[str, Any]:
        return of(planned("recipe=bigrec", f"stages.teacher.validate={validate}", *overrides, *SMALL), "teacher")

    def flops(validate: str, users: int) -> tuple[float, float]:
        """Of a validation, and of a training step."""
        asked = [f"stages.teacher.validation_users={users}", "stages.teacher.trainer.max_epochs=4"]
        all, half = (teacher(validate, f"stages.teacher.trainer.validate_every={every}", *asked) for every in (1, 2))
        one = (all["flops"] - half["flops"]) / 2
        return one, (all["flops"] - 4 * one) / (all["epochs"] * all["steps"])

    one, step = flops("loss", 32)  # a batch
    assert one == pytest.approx(step / 3, rel=0.1), "forward alone"
    assert flops("loss", 64)[0] == pytest.approx(2 * one)
    sixteen, more = (flops("ranking", users)[0] for users in (16, 32))
    assert 0.4 * one < more - sixteen < one, "of 16 prompts and what is said after them"
    assert sixteen > 1.2 * (more - sixteen), "and all titles are read"
    tables = 8 * (80 + 1) * (64 + 2)
    assert teacher("ranking")["memory"]["validation"] > tables
    large = ["scale=paper", "stage=teacher"]
    by_loss, by_ranking = (teacher(validate, *large) for validate in ("loss", "ranking"))
    assert by_ranking["memory"]["peak"] > by_loss["memory"]["peak"], "keys and values of what is read and said"
    assert by_ranking["hours"] > by_loss["hours"]


@pytest.mark.parametrize(("recipe", "stage"), [("cd", "lists"), ("slmrec", "signals")])
def test_a_record_reads_out_every_position(recipe: str, stage: str) -> None:
    plans = [planned(f"recipe={recipe}", f"sequences.examples={which}", *SMALL) for which in ("sequence", "last")]
    every, last = (of(found, stage) for found in plans)
    written = every["disk"]["kept"] - last["disk"]["kept"]
    assert every["memory"]["buffers"] - last["memory"]["buffers"] > 2 * written, "states are halved, and items too"
    assert every["flops"] > last["flops"]
    if stage == "lists":
        assert every["flops"] - last["flops"] > written / (8 * 100) * 2 * 64 * plans[0]["data"]["items"], "all items are scored"


# ---- disk ------------------------------------------------------------------------------------------------------------------


def test_a_base_in_half_precision_takes_half_the_disk() -> None:
    half = ["teacher.dtype=bfloat16", "stages.export.of=teacher", *SMALL]
    one, both = (
        planned("recipe=slmrec", f"stages.export.export={formats}", *half) for formats in ("[onnx]", "[safetensors,onnx]")
    )
    counts = of(one, "teacher")["parameters"]
    rest = counts["item_table"] + (128 * 64 + 64) + 64 * 128
    assert of(one, "export")["disk"]["kept"] == 4 * counts["total"]
    assert of(both, "export")["disk"]["kept"] == 4 * counts["total"] + 2 * (counts["total"] - rest) + 4 * rest
    whole = of(planned("recipe=slmrec", "trainer=zero3", "trainer.precision=bf16-mixed", *half), "teacher")["disk"]
    table = 4 * counts["item_table"]
    assert whole["kept"] == table + 2 * counts["trainable"]
    assert whole["checkpoint"] == 12 * counts["trainable"]
    assert of(one, "teacher")["disk"]["kept"] == table + 12 * counts["trainable"], "what trains is float32"


@pytest.mark.parametrize("lora", ["null", "{rank:4,alpha:8,dropout:0.0,targets:[q_proj]}"])
def test_a_tuned_model_is_saved_beside_its_checkpoint(lora: str) -> None:
    teacher = of(planned("recipe=bigrec", "stage=teacher", f"teacher.lora={lora}", *SMALL), "teacher")
    counts = teacher["parameters"]
    assert teacher["disk"]["checkpoint"] == 12 * counts["trainable"]
    assert teacher["disk"]["kept"] == 12 * counts["trainable"] + 4 * counts["total"], "with the base, which is drawn"


# ---- the verdict -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_card(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(CARDS, "small", Card(16, 100, 10, 100, "none"))
    return "small"


def test_what_does_not_fit_is_said_with_the_cures(small_card: str) -> None:
    large = ["recipe=slmrec", "scale=paper", "teacher.lora=null", "teacher.gradient_checkpointing=false", *SMALL]
    found = planned(*large, f"gpu={small_card}")
    teacher = of(found, "teacher")
    assert teacher["memory"]["peak"] > USABLE * 16 * 2**30
    assert teacher["fits"] is False
    assert "teacher does not fit small" in teacher["verdict"]
    assert "LoRA" in teacher["verdict"]
    assert "trainer=zero3" in teacher["verdict"]
    assert of(found, "item_embeddings")["fits"]
    assert of(found, "item_embeddings")["verdict"] is None
    cured = of(planned(*large, f"gpu={small_card}", "trainer=zero3", "trainer.devices=8"), "teacher")
    assert cured["fits"]


# ---- the command -------------------------------------------------------------------------------------------------------------


def test_json_has_what_jobs_are_made_from(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["scale=paper", "trainer=zero3", "trainer.num_nodes=2", "trainer.devices=4", "seeds=[0,1]"]
    assert plan.main(["recipe=slmrec", *overrides, *SMALL, "price=2.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    teacher, student = of(found, "teacher"), of(found, "student")
    assert set(teacher) >= STRUCTURE | {"accelerated", "done", "parameters", "memory", "fits", "flops", "hours", "disk"}
    assert (teacher["processes"], teacher["num_nodes"], teacher["devices"], teacher["strategy"]) == (8, 2, 4, "zero3")
    assert teacher["needs"] == ["prepare", "item_embeddings"]
    assert (student["seeds"], student["repeated"]) == ([0, 1], True)
    assert not of(found, "prepare")["accelerated"]
    assert teacher["gpu_hours"] == pytest.approx(8 * teacher["hours"])
    assert teacher["cost"] == pytest.approx(2.5 * teacher["gpu_hours"])
    assert teacher["energy_kwh"] == pytest.approx(0.7 * teacher["gpu_hours"])
    assert found["totals"]["hours"] == pytest.approx(sum(stage["hours"] or 0 for stage in found["stages"]))


def test_the_table_has_a_row_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["recipe=rlmrec-con", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in ("prepare", "text", "student", "control", "evaluate", "export"))
    assert "Total: " in printed


def test_unknown_data_are_not_guessed() -> None:
    found = planned("recipe=student", "data=amazon-beauty")
    assert found["data"] is None
    assert of(found, "student")["memory"] is None
    assert "prepare" in of(found, "student")["notes"][0]
    stated = planned("recipe=student", "data=amazon-beauty", "sizes=[1000,500,20000]")
    assert stated["data"] == {
        "origin": "sizes=",
        "exact": False,
        "users": 1000,
        "items": 500,
        "interactions": pytest.approx(20000, rel=0.05),
    }
    assert of(stated, "student")["memory"]["peak"] > 0


def test_stated_sizes_count_where_other_data_are_prepared(tmp_path) -> None:
    prepared: Any = SimpleNamespace(done=True, folder=tmp_path)  # which is not read
    known = known_data(prepared, (1000, 500, 20000))
    assert known is not None
    assert (known.origin, known.dataset.n_users) == ("sizes=", 1000)


def test_a_stand_in_has_the_size_that_was_stated() -> None:
    data = stand_in(6040, 3706, 1_000_209)
    assert (data.n_users, data.n_items) == (6040, 3706)
    assert len(data.items) == pytest.approx(1_000_209, rel=0.01)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("gpu=h100-80g", "Did you mean 'h100-80gb'"),
        ("utilisation=1.5", "above 0 and at most 1"),
        ("price=-1", "above 0"),
        ("sizes=[1,2]", "three numbers"),
        ("sizes=[10,5,20]", "three interactions"),
    ],
)
def test_bad_arguments_name_the_cure(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["recipe=student", argument, *SMALL]) == 2
    assert said in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lit_llmers import plan; plan.main(['--help']); assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "h100-80gb" in done.stdout


def test_no_recipe_is_an_error_that_lists_them() -> None:
    with pytest.raises(UserError, match="slmrec"):
        plan.parse(["gpu=h100-80gb"])
