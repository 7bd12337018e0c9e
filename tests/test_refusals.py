"""Settings that cannot work are refused with their name, in one line, before anything runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import by_name

from lit_llmers import comparable, fit, plan, recipes
from lit_llmers.composing.resolving import resolve
from lit_llmers.conf.schema import TrainerConfig
from lit_llmers.errors import UserError
from lit_llmers.files import write_json
from lit_llmers.processes.strategies import check_machine
from lit_llmers.reporting.results import Results
from lit_llmers.serving import find_export

MAPPING = r"It must be a mapping, as \{key: value\}"
NONE = "no Hugging Face configuration"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.student.model.layers=64", "64 layers were asked of the base 'tiny-llama', which has 32"),
        ("stages.student.model.layers=-4", "-4 layers were asked of the base"),
        ("stages.evaluate.of=[]", "'of' of the evaluate stage is empty"),
        ("stages.export.export=[]", "'export' of the export stage is empty. Name formats: safetensors, onnx"),
        ("pairs=[[student]]", r"pairs has \['student'\]. Each must be two stages"),
        ("pairs=null", "'pairs' is None. It must be a list"),
        ("pairs=[student,control]", r"'pairs\[0\]' is 'student'. It must be a list"),
        ("pairs=[[studnt,control]]", r"Unknown stage in 'pairs' 'studnt'. Did you mean 'student'\?"),
        ("teacher.config.num_attention_heads=3", f"{NONE}.*not a multiple of the number of attention heads"),
        ("teacher.config.hidden_size=wide", f"{NONE}.*hidden_size"),
        (
            "teacher.config.hidden_sze=16",
            r"Unknown configuration key 'teacher.config.hidden_sze'.*Did you mean 'hidden_size'\?",
        ),
        ("teacher.lora={rank: 0}", "lora.rank is 0. It must be at least 1"),
        ("teacher.lora={alpha: 0}", "lora.alpha is 0. It must be at least 1"),
        ("teacher.lora={alpha: -16}", "lora.alpha is -16"),
        ("teacher.lora={dropout: 1}", "lora.dropout is 1"),
        ("teacher.lora={targets: [q_pro]}", r"\['q_pro'\] is not a linear layer"),
        ("teacher.lora={targets: q_proj}", "'teacher.lora.targets' is 'q_proj'. It must be a list"),
        ("teacher.attention=flsh", "Unknown teacher.attention 'flsh'. There is: eager"),
        ("trainer.accelerator=gpuu", r"accelerator \(trainer.accelerator\) 'gpuu'. Did you mean 'gpu'\?"),
        ("seeds=[4294967296]", r"seeds is \[4294967296\].*less than 2\*\*32"),
        ("seed=4294967296", r"seed is 4294967296.*less than 2\*\*32"),
        ("signals.shard_rows=-5", "signals.shard_rows is -5. It must be at least 1, or null"),
        ("student.loss=bce", f"'stages.student.loss' is 'bce'. {MAPPING}"),
        ("stages.student.trainer=ddp", f"'stages.student.trainer' is 'ddp'. {MAPPING}"),
        ("stages.student.sequences=null", f"'stages.student.sequences' is None. {MAPPING}"),
        ("stages.evaluate.evaluation=full", f"'stages.evaluate.evaluation' is 'full'. {MAPPING}"),
        ("stages.text.trainer=5", f"'stages.text.trainer' is 5. {MAPPING}"),
        ("sequences=null", f"'sequences' is None. {MAPPING}"),
        ("teacher.lora=5", f"'teacher.lora' is 5. {MAPPING}"),
        ("teacher.config=5", f"'teacher.config' is 5. {MAPPING}"),
        ("stages.student.model.base=5", f"'stages.student.model.base' is 5. {MAPPING}"),
        ("student.initial=text", f"'stages.student.initial' is 'text'. {MAPPING}"),
        ("data.generator=null", f"'data.generator' is None. {MAPPING}"),
        ("data.texts=[5]", r"'data.texts\[0\]' is 5. It must be a text"),
        ("data.quantiles=[a,b]", r"'data.quantiles\[0\]' is 'a'. It must be a number"),
        ("student.fit=5", "Unknown name in lit_llmers/backbones '5'"),
        ("stages.student.like=5", f"'stages.student.like' is 5. {MAPPING} or a text"),
        ("stages.evaluate.of=[5]", r"'stages.evaluate.of\[0\]' is 5. It must be a text"),
        ("stages.student.items=[5]", r"'stages.student.items\[0\]' is 5. It must be a text"),
        (
            "stages.student.callbacks=[{feature_distillation: 5}]",
            f"'stages.student.callbacks.feature_distillation' is 5. {MAPPING}",
        ),
        ("repeat=null", "'repeat' is None. It must be a list"),
        ("repeat=student", "'repeat' is 'student'. It must be a list"),
        ("stages=null", f"'stages' is None. {MAPPING}"),
        ("stages.student=5", f"'stages.student' is 5. {MAPPING}"),
        ("~seeds", "'slmrec' lacks 'seeds'"),
        ("~evaluation", "'slmrec' lacks 'evaluation'"),
        ("run.name=", "run.name is ''. It must name one folder"),
        ("run.name=..", "run.name is '..'"),
        ("run.name=../../esc", "run.name is '../../esc'.*run.dir=FOLDER"),
        ("run.name=lr/small", "run.name is 'lr/small'"),
    ],
)
def test_what_cannot_work_is_named_before_anything_runs(override, message):
    with pytest.raises(UserError, match=message):
        resolve(recipes.compose("slmrec", [override]))


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("student", "teacher.pth=/x", r"Unknown configuration key 'teacher.pth'. Did you mean 'path'\?"),
        ("bigrec", "stages.teacher.generation=5", f"'stages.teacher.generation' is 5. {MAPPING}"),
        ("bigrec", "teacher.config.num_attention_heads=3", NONE),
        ("bigrec", "teacher.config.hidden_sze=16", r"'teacher.config.hidden_sze'"),
    ],
)
def test_so_it_is_of_other_recipes(recipe, override, message):
    with pytest.raises(UserError, match=message):
        resolve(recipes.compose(recipe, [override]))


def test_what_transformers_reads_beside_its_own_fields_is_taken():
    for given in ("rope_theta: 5e5", "model_type: qwen2, head_dim: 16"):
        assert resolve(recipes.compose("slmrec", [f"teacher.config={{hidden_size: 32, num_attention_heads: 2, {given}}}"]))


def test_a_number_is_a_name_as_it_was_written():
    for name in ("5", "2024_11", "1e3", "007"):
        run = resolve(recipes.compose("student", [f"run.name={name}"]))[0].run
        assert (run.name, run.folder) == (name, Path("runs/student") / name)


@pytest.mark.parametrize("accelerator", ["cuda", "gpu"])
def test_an_accelerator_that_is_not_there(monkeypatch, accelerator):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(UserError, match=f"trainer.accelerator={accelerator}, but PyTorch finds no GPU here"):
        check_machine(TrainerConfig(accelerator=accelerator))
    check_machine(TrainerConfig())


def test_a_run_asks_for_the_accelerator_before_it_prepares(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert fit.main(["recipe=student", "trainer.accelerator=cuda", "logger=csv", f"run.dir={tmp_path}"]) == 2
    assert "PyTorch finds no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.glob("student/default/prepare-*"))


# ---- recipe files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", f"mine.yaml' is .*{MAPPING}"),
        (
            "defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv]\nstages: {}",
            "'mine' has no stages",
        ),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        resolve(recipes.compose(str(tmp_path / "mine.yaml"), []))


def test_an_ending_that_hydra_does_not_take_is_refused_with_the_one_it_takes(tmp_path):
    (tmp_path / "my.yml").write_text("stages: {}")
    with pytest.raises(UserError, match=r"my\.yml only under the ending \.yaml\. Rename it to my\.yaml"):
        recipes.find(str(tmp_path / "my.yml"))


# ---- the home folder -------------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder_wherever_a_folder_or_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.npy").write_bytes(b"x")
    for form in ("{}", "'{}'"):
        given = [f"run.dir={form.format('~/runs')}", f"evaluation.candidates={form.format('~/mine.npy')}"]
        stage = by_name(resolve(recipes.compose("student", given)))["evaluate"]
        assert stage.run.folder == tmp_path / "runs/student/default"
        assert stage.config.evaluation.candidates == str(tmp_path / "mine.npy")
    root, _ = comparable.planned_runs(comparable.parse(["students=[sasrec]", "run.dir=~/runs"]))
    assert root == tmp_path / "runs/compare/demo"
    write_json(tmp_path / "run.json", {"stages": [], "data": {}, "command": "again"})
    assert Results(Path("~")).run == tmp_path
    with pytest.raises(UserError, match=f"{tmp_path} has no finished export"):
        find_export(Path("~"))


def test_a_comparison_stays_in_its_folder():
    with pytest.raises(UserError, match="run.name is '../x'"):
        comparable.planned_runs(comparable.parse(["students=[sasrec]", "run.name=../x"]))


# ---- commands --------------------------------------------------------------------------------------------------------


def test_config_prints_no_key_that_there_is_not(capsys):
    assert fit.main(["recipe=student", "trainer.max_epoch=3", "--config"]) == 2
    said = capsys.readouterr()
    assert (said.out, "Did you mean 'max_epochs'" in said.err) == ("", True)


def test_a_plan_is_of_the_stages_that_are_asked_for():
    given = ["recipe=student", "logger=csv", "data.generator.users=60", "data.generator.items=80"]
    names = [stage["name"] for stage in plan.plan(plan.parse([*given, "stage=student"]))["stages"]]
    assert names == ["prepare", "student"]
    with pytest.raises(UserError, match="Unknown stage 'nope'"):
        plan.plan(plan.parse([*given, "stage=nope"]))


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("training", "student"),
        ("tuning", "teacher"),
        *[(verb,) * 2 for verb in ("prepare", "encode", "record", "evaluate", "export")],
    ],
)
def test_a_stage_s_file_is_no_command_and_says_which_is(file, stage):
    command = [sys.executable, "-m", f"lit_llmers.{file}", "--help"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (said.returncode, said.stdout) == (2, "")
    assert f"python -m lit_llmers.fit recipe=NAME stage={stage}" in said.stderr
