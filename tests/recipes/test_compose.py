"""Every shipped recipe composes with every option; what is unknown is named, with the nearest known name."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import by_name

from lit_llmers import recipes
from lit_llmers.building import find
from lit_llmers.composing.resolving import resolve
from lit_llmers.errors import UserError

RECIPES = sorted(recipes.available())
NEEDS = {  # what an option cannot do without
    "data=local": ["data.path=FOLDER"],
    "teacher=local": ["teacher.path=FOLDER"],
    "student=sasrec": ["student.model.layers=4"],
    "student=gru4rec": ["student.model.layers=4"],
    "student=cl4srec": ["student.model.layers=4"],
}
OPTIONS = [f"{group}={name}" for group in recipes.GROUPS for name in recipes.options(group)]
# slmrec's terms are about the hidden states of each next item
FITTED = ("llm", "sasrec", "gru4rec", "cl4srec")
UNFIT = [f"student={name}" for name in recipes.options("student") if name not in FITTED]
TEXT = {name: ["text=minilm"] for name in ("dllm2rec", "llm-esr", "rlmrec-con")}
SHALLOW = """\
# A recipe of one's own: one model, no LLM.
defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
sequences: {max_length: 7}
stages:
  prepare: {prepare: interactions}
  model: {fit: sasrec, model: {dim: 8}}
"""


@pytest.fixture
def mine(tmp_path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(SHALLOW)
    return path


def scales(name: str) -> list[str]:
    from omegaconf import OmegaConf

    return ["laptop", *(OmegaConf.load(recipes.find(name)).get("scales") or {})]


SCALED = [(name, f"scale={scale}") for name in RECIPES for scale in scales(name)]


def test_there_are_recipes_and_options():
    assert "slmrec" in RECIPES
    assert {"data=ml-1m", "teacher=llama2-7b", "trainer=single", "logger=wandb"} <= set(OPTIONS)


FITTING = [
    (name, option)
    for name in ("slmrec", "student")
    for option in OPTIONS
    if not option.startswith("text=")
    and (name, option) != ("student", "student=llm")
    and (name != "slmrec" or option not in UNFIT)
]
SEQUENTIAL = ("sasrec", "gru4rec", "cl4srec", "caser", "srgnn")  # students that train on each next item
GRAPHS = ("lightgcn", "sgl", "simgcl", "mixgcf")
OF_GRAPHS = ("llminit", "rlmrec-con", "rlmrec-gen")
OWN = ("slmrec", "student", "alpharec")  # tested above, or a student of its own
FAMILIES = [
    (name, f"student={student}")
    for name in RECIPES
    if name not in OWN
    for student in (GRAPHS if name in OF_GRAPHS else SEQUENTIAL)
]


@pytest.mark.parametrize(("name", "option"), FITTING)
def test_every_recipe_plans_with_every_option(name, option, no_files):
    config = recipes.compose(name, [option, *(NEEDS.get(option, []) if name == "slmrec" or "student" not in option else [])])
    group, _, chosen = option.partition("=")
    if group in ("data", "teacher"):
        assert config[group]["name"] == chosen
    if group == "logger":
        assert config[group]["kind"] == chosen
    for stage in resolve(config):
        if stage.verb == "fit":
            find("backbones", stage.config.fit)
            for callback_name, _ in stage.config.terms:
                find("callbacks", callback_name)


@pytest.mark.parametrize(("name", "option"), FAMILIES)
def test_every_method_takes_any_student_of_its_task(name, option, no_files):
    planned = by_name(resolve(recipes.compose(name, [option, "data=ml-1m", *TEXT.get(name, [])])))
    student, control = planned["student"].config, planned["control"].config
    assert student.fit == control.fit
    start = planned["control" if name == "pad" else "student"].config  # PAD trains on from there at a tenth of its rate
    assert start.optimizer == control.optimizer
    assert student.trainer == control.trainer
    assert student.sequences == control.sequences
    assert (student.fusion, student.initial, student.callbacks) != ([], None, []), "the method adds something"
    assert (control.fusion, control.initial, control.callbacks) == ([], None, []), "the control is without it"


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("dllm2rec", "student=bert4rec"),
        ("rlmrec-gen", "student=bpr-mf"),
        ("llm-esr", "student=lightgcn"),
        ("rd", "student=item-knn"),
    ],
)
def test_a_student_of_another_task_is_refused_before_anything_runs(name, option, no_files):
    with pytest.raises(UserError, match="does not train on next items|does not fit|reads no history|counted and not trained"):
        resolve(recipes.compose(name, [option]))


@pytest.mark.parametrize(
    ("name", "option", "cure"),
    [
        ("student", "student=llm", "such as recipe=slmrec"),
        ("dllm2rec", "student=bpr-mf", "such as student=sasrec"),
        ("llmemb", "student=popularity", r"reads 'student\.model\.dim', a setting that the student given does not have"),
        ("llmemb", "student=llm", "Choose another student"),
        ("slmrec", "student=caser", r"The 1 layer of .* caser always has as many, so it does not fit: .* as student=sasrec"),
    ],
)
def test_a_student_that_does_not_fit_is_refused_with_what_does(name, option, cure, no_files):
    with pytest.raises(UserError, match=cure):
        resolve(recipes.compose(name, [option]))


def test_a_text_that_is_no_choice_of_the_recipe_is_refused_with_the_keys_that_choose(no_files):
    with pytest.raises(UserError, match=r"Its stage 'text' is set by stages\.text\.encode and stages\.text\.model\. "):
        recipes.compose("slmrec", ["text=minilm"])
    with pytest.raises(UserError, match=r"Recipe 'student' has no text to choose\. Leave 'text=minilm' out\."):
        recipes.compose("student", ["text=minilm"])
    chosen = ["stages.text.encode=transformer", "stages.text.model=minilm"]
    assert by_name(resolve(recipes.compose("slmrec", chosen)))["text"].config.model == "minilm"


@pytest.mark.parametrize("name", ["slmrec", "bigrec"])
def test_a_teacher_s_folder_that_is_not_there_is_refused_before_anything_runs(name, no_files):
    with pytest.raises(UserError, match="There is no folder /nowhere, the base 'local'"):
        resolve(recipes.compose(name, ["teacher=local", "teacher.path=/nowhere"]))


@pytest.mark.parametrize("option", UNFIT)
def test_a_student_that_the_method_does_not_fit_is_refused_before_anything_runs(option, no_files):
    with pytest.raises(
        UserError, match="does not train on next items|does not fit|cannot be cut|reads one position|counted and not trained"
    ):
        resolve(recipes.compose("slmrec", [option]))


@pytest.mark.parametrize(
    ("key", "entry", "kind"),
    [("callbacks", "{deep_supervision: {blocks: 2}}", "callback"), ("fusion", "{add_projected: {from: text}}", "fusion")],
)
def test_a_second_part_of_one_name_is_refused(tmp_path, key, entry, kind):
    recipe = tmp_path / "twice.yaml"
    text = SHALLOW.replace("model: {dim: 8}}", f"model: {{dim: 8}}, {key}: [{entry}, {entry}]}}")
    recipe.write_text(text.replace("  model: {fit", "  text: {encode: tfidf}\n  model: {fit"))
    with pytest.raises(UserError, match=f"has the {kind} .* twice"):
        resolve(recipes.compose(str(recipe), []))


def test_a_source_of_null_is_one_that_is_not_given(tmp_path):
    recipe = tmp_path / "null.yaml"
    text = SHALLOW.replace("  model: {fit", "  text: {encode: tfidf}\n  model: {fit")
    recipe.write_text(text.replace("model: {dim: 8}}", "model: {dim: 8}, fusion: [{concat: {from: text, id: null}}]}"))
    assert by_name(resolve(recipes.compose(str(recipe), [])))["model"].needs
    recipe.write_text(text.replace("model: {dim: 8}}", "model: {dim: 8}, fusion: [{concat: {from: null}}]}"))
    with pytest.raises(UserError, match="concat.from' is missing: name a fit or encode stage"):
        resolve(recipes.compose(str(recipe), []))


def test_an_llm_alone_lacks_the_item_vectors_of_another_stage(no_files):
    with pytest.raises(UserError, match="stages.student.items"):
        resolve(recipes.compose("student", ["student=llm"]))


def test_cl4srec_without_its_contrast_is_sasrec(no_files):
    ours, control = (
        by_name(resolve(recipes.compose("student", [f"student={name}"])))["student"].config for name in ("cl4srec", "sasrec")
    )
    assert [name for name, _ in ours.terms] == ["sequence_contrast"]
    assert replace(ours, objective=[]) == control


def test_what_is_said_of_the_whole_run_wins_over_the_students_own_file(no_files):
    student = by_name(resolve(recipes.compose("student", ["student=bert4rec", "trainer.max_epochs=2"])))["student"].config
    assert student.trainer.max_epochs == 2
    assert by_name(resolve(recipes.compose("student", ["student=bert4rec"])))["student"].config.trainer.max_epochs > 2


def test_what_is_said_of_the_student_wins_over_what_is_said_of_the_whole_run(no_files):
    given = ["student=bert4rec", "student.trainer.max_epochs=7", "trainer.max_epochs=2", "trainer.patience=1"]
    student = by_name(resolve(recipes.compose("student", given)))["student"].config
    assert (student.trainer.max_epochs, student.trainer.patience) == (7, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_the_trainer_of_the_whole_run_reaches_every_stage_that_trains(name, no_files):
    planned = resolve(
        recipes.compose(name, ["trainer.max_epochs=2", "trainer.batch_size=6", "data=ml-1m", *TEXT.get(name, [])])
    )
    trainers = {stage.name: stage.config.trainer for stage in planned if getattr(stage.config, "trainer", None)}
    assert {"student"} <= set(trainers)
    assert {(trainer.max_epochs, trainer.batch_size) for trainer in trainers.values()} == {(2, 6)}


def test_a_stage_s_own_word_on_the_command_line_wins_and_its_learning_rate_is_its_own(no_files):
    given = ["stages.student.trainer.max_epochs=5", "trainer.max_epochs=2", "optimizer.lr=0.5"]
    planned = by_name(resolve(recipes.compose("alpharec", given)))
    student, control = planned["student"].config, planned["control"].config
    assert (student.trainer.max_epochs, control.trainer.max_epochs) == (5, 2)
    assert (student.trainer.batch_size, student.trainer.patience) == (4096, 20), "of which nothing was said"
    assert (student.optimizer.lr, control.optimizer.lr) == (5e-4, 0.5)


def test_a_word_beside_a_scale_reaches_the_stages_that_the_scale_names(no_files):
    planned = by_name(resolve(recipes.compose("slmrec", ["scale=paper", "trainer.max_epochs=2"])))
    teacher, embeddings = planned["teacher"].config.trainer, planned["item_embeddings"].config.trainer
    assert teacher.max_epochs == embeddings.max_epochs == 2
    assert embeddings.batch_size == 1024


def test_a_word_beside_a_scale_wins_over_what_the_scale_says_of_the_student(mine, no_files):
    text = SHALLOW.replace("/trainer: single", "/trainer: single, /student: sasrec").partition("  model:")[0]
    mine.write_text(
        f'{text}  student: {{like: "${{student}}"}}\nscales: {{big: {{student.trainer.max_epochs: 9, trainer.patience: 3}}}}\n'
    )
    for given, expected in (
        ([], 9),
        (["trainer.max_epochs=2"], 2),
        (["trainer.max_epochs=2", "student.trainer.max_epochs=4"], 4),
    ):
        trainer = by_name(resolve(recipes.compose(str(mine), ["scale=big", *given])))["student"].config.trainer
        assert (trainer.max_epochs, trainer.patience) == (expected, 3)


def test_what_a_scale_says_of_the_student_is_of_the_recipes_own(mine, no_files):
    text = SHALLOW.replace("/trainer: single", "/trainer: single, /student: sasrec").partition("  model:")[0]
    says = "{student.model.heads: 1, student.loss: {kind: bce, negatives: 1}, trainer.patience: 3}"
    mine.write_text(f'{text}  student: {{like: "${{student}}"}}\nscales: {{big: {says}}}\n')
    own = by_name(resolve(recipes.compose(str(mine), ["scale=big", "student=sasrec"])))["student"].config
    assert (own.model["heads"], own.loss.kind, own.trainer.patience) == (1, "bce", 3)
    other = by_name(resolve(recipes.compose(str(mine), ["scale=big", "student=gru4rec"])))["student"].config
    assert "heads" not in other.model
    assert (other.loss.kind, other.trainer.patience) == ("cross_entropy", 3)


@pytest.mark.parametrize("student", sorted(set(recipes.options("student")) - {"sasrec", "llm"}))
def test_every_student_has_its_own_settings_at_the_papers_scale_of_another(student, no_files):
    configs = [recipes.compose("student", [f"student={student}", *given]) for given in ([], ["scale=paper"])]
    laptop, paper = [by_name(resolve(config))["student"].config for config in configs]
    assert laptop.model == paper.model
    for section in ("loss", "optimizer", "trainer"):
        assert getattr(laptop, section) == getattr(paper, section)
    assert paper.sequences.max_length == 200


@pytest.mark.parametrize(("name", "scale"), SCALED)
def test_every_scale_plans_and_is_what_the_recipe_says(name, scale, no_files):
    from omegaconf import OmegaConf

    config = recipes.compose(name, [scale])
    resolve(config)
    for key, value in recipes.scale_settings(recipes.find(name), scale.removeprefix("scale=")).items():
        if key.startswith("~"):
            assert OmegaConf.select(OmegaConf.create(config), key.removeprefix("~")) is None, key
        elif key not in recipes.GROUPS and "${" not in str(value):
            assert OmegaConf.select(OmegaConf.create(config), key) == value, key
    assert "scales" not in config


def test_a_scale_is_like_another_and_wins_over_it(mine):
    from omegaconf import OmegaConf

    shared = OmegaConf.load(recipes.CONF / "scale" / "llm-esr.yaml")
    text = mine.read_text() + "scales: {paper: {like: llm-esr, trainer.batch_size: 9}, other: {like: llm-erS}}\n"
    mine.write_text(text.replace("/trainer: single", "/student: sasrec, /trainer: single"))
    config = recipes.compose(str(mine), ["scale=paper"])
    assert (config["trainer"]["batch_size"], config["trainer"]["max_epochs"]) == (9, shared["trainer.max_epochs"])
    with pytest.raises(UserError, match="scale in 'scales.other.like' 'llm-erS'. Did you mean 'llm-esr'"):
        recipes.compose(str(mine), ["scale=other"])


@pytest.mark.parametrize("name", RECIPES)
def test_the_parts_of_every_recipe_can_be_made_before_anything_runs(name, no_files, caplog):
    caplog.set_level("DEBUG", "lit_llmers.composing.compatibility")
    assert resolve(recipes.compose(name, TEXT.get(name, [])))
    assert not caplog.messages


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_begins_with_its_title(name):
    assert len(recipes.title(recipes.available()[name])) > 20


def test_overrides_beside_a_scale_win(no_files):
    config = recipes.compose("slmrec", ["trainer.batch_size=3", "scale=paper", "stages.teacher.model.dropout=0.3"])
    assert config["trainer"]["batch_size"] == 3
    assert config["stages"]["teacher"]["model"]["dropout"] == 0.3
    assert config["teacher"]["name"] == "llama2-7b"


def test_what_a_teacher_says_of_examples_holds_until_it_is_overridden():
    assert recipes.compose("slmrec", [])["sequences"]["examples"] == "sequence"
    assert recipes.compose("slmrec", ["teacher=llama2-7b"])["sequences"]["examples"] == "last"
    given = recipes.compose("slmrec", ["teacher=llama2-7b", "sequences.examples=prefixes"])
    assert given["sequences"]["examples"] == "prefixes"


def test_the_item_embeddings_train_on_all_targets_whatever_the_teacher_trains_on(no_files):
    planned = by_name(resolve(recipes.compose("slmrec", ["teacher=llama2-7b"])))
    assert planned["teacher"].config.sequences.examples == "last"
    assert planned["item_embeddings"].config.sequences.examples == "sequence"


def test_a_key_below_an_interpolation_can_be_set_and_reaches_only_its_stage():
    config = recipes.compose("slmrec", ["stages.student.model.layers=2", "teacher.seed=4", "stages.student.callbacks=[]"])
    planned = by_name(resolve(config | {"stages": {k: v for k, v in config["stages"].items() if k != "export"}}))
    student, teacher = planned["student"].config.model, planned["teacher"].config.model
    assert (student["layers"], teacher["layers"]) == (2, 8)
    assert student["base"]["seed"] == teacher["base"]["seed"] == 4


def test_settings_that_no_yaml_writes_can_be_given():
    config = recipes.compose("slmrec", ["data.generator.users=99", "stages.student.optimizer.lr=0.5", "data.k_core=7"])
    assert config["data"]["generator"] == {"users": 99}
    assert config["stages"]["student"]["optimizer"] == {"lr": 0.5}
    assert by_name(resolve(config))["prepare"].config.k_core == 7


def test_an_entry_of_a_list_is_set_and_left_out_by_its_place():
    weight = "stages.student.callbacks.0.ranking_distillation.weight=0.5"
    (entry,) = recipes.compose("rrd", [weight])["stages"]["student"]["callbacks"]
    assert entry["ranking_distillation"]["weight"] == 0.5
    assert recipes.compose("rrd", ["~stages.student.callbacks.0"])["stages"]["student"]["callbacks"] == []
    for wrong in ("1", "x"):
        with pytest.raises(
            UserError, match=rf"stages\.student\.callbacks is a list of 1, counted from 0; '{wrong}' is no place"
        ):
            recipes.compose("rrd", [weight.replace(".0.", f".{wrong}.")])


def test_a_stage_can_be_added_and_left_out(no_files):
    planned = resolve(recipes.compose("slmrec", ["stages.more={fit: gru4rec}", "~stages.export", "~stages.student.callbacks"]))
    names = [stage.name for stage in planned]
    assert names[-1] == "more"
    assert "export" not in names
    assert by_name(planned)["student"].config.callbacks == []


@pytest.mark.parametrize("overrides", [["student=sasrec"], ["student=gru4rec"], ["student=llm"]])
def test_another_student_is_one_override(overrides, no_files):
    planned = by_name(resolve(recipes.compose("slmrec", [*overrides, "stages.student.model.layers=4"])))
    assert planned["student"].config.fit == overrides[0].removeprefix("student=").replace("llm", "llm_decoder")
    assert planned["control"].config.fit == planned["student"].config.fit


# ---- recipes of one's own --------------------------------------------------------------------------------------------


def test_a_recipe_by_path(mine, monkeypatch):
    config = recipes.compose(str(mine), ["trainer.max_epochs=2"])
    assert (config["recipe"], config["trainer"]["max_epochs"], config["sequences"]["max_length"]) == ("mine", 2, 7)
    assert [stage.name for stage in resolve(config)] == ["prepare", "model"]
    monkeypatch.chdir(mine.parent)
    assert recipes.compose("mine.yaml", [])["recipe"] == "mine"


def test_recipes_in_the_folder_at_hand_have_names_and_win(mine, monkeypatch, tmp_path):
    (tmp_path / "recipes").mkdir()
    for name in ("mine", "slmrec"):
        (tmp_path / "recipes" / f"{name}.yaml").write_text(SHALLOW)
    monkeypatch.chdir(tmp_path)
    assert {"mine", "slmrec"} <= set(recipes.available())
    assert list(recipes.compose("slmrec", [])["stages"]) == list(recipes.compose("mine", [])["stages"]) == ["prepare", "model"]


def test_a_recipe_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"There is no recipe file .*gone\.yaml.*slmrec"):
        recipes.compose(str(tmp_path / "gone.yaml"), [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stages: [}", "mine.yaml is not valid YAML.*line 1"),
        ("defaults: [/bose, _self_]\nstages: {}", "mine.*does not compose.*bose"),
        ("defaults: [/base, /data: nowhere, _self_]\nstages: {}", "mine.*does not compose.*nowhere"),
        (SHALLOW.replace("dim: 8", "dim: '${nothing}'"), "mine.*does not resolve.*nothing"),
        ("stages: {prepare: {prepare: interactions}}", "mine.*lacks 'run'.*/base"),
        (SHALLOW.partition("stages")[0], "mine.*lacks 'stages'"),
        ("", "mine.*lacks 'run'"),
    ],
)
def test_a_recipe_file_that_is_wrong(mine, content, message):
    mine.write_text(content)
    with pytest.raises(UserError, match=message):
        resolve(recipes.compose(str(mine), []))


# ---- unknown names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=ml1m", r"Unknown option of data 'ml1m'. Did you mean 'ml-1m'\? There is: amazon-beauty"),
        ("teacher=lama2-7b", r"Unknown option of teacher.*Did you mean 'llama2-7b'\?"),
        ("student=sasreq", r"Unknown option of student.*Did you mean 'sasrec'\?"),
        ("trainer=singel", r"Unknown option of trainer.*Did you mean 'single'\?"),
        ("logger=wandbb", r"Unknown option of logger.*Did you mean 'wandb'\?"),
        ("scale=papr", r"Unknown scale of slmrec 'papr'. Did you mean 'paper'\? There is: laptop, paper"),
        ("repaet=[student]", r"Unknown configuration key 'repaet'. Did you mean 'repeat'\?"),
        ("trainer.max_epoch=1", r"Unknown configuration key 'trainer.max_epoch'. Did you mean 'max_epochs'\?"),
        ("trainr.max_epochs=1", r"Unknown configuration key 'trainr.max_epochs'. Did you mean 'trainer.max_epochs'\?"),
        ("sequence.max_length=1", r"Unknown configuration key 'sequence.max_length'. Did you mean 'sequences.max_length'\?"),
        ("run.nam=x", r"'run.nam'. Did you mean 'name'\?"),
        ("logger.knd=x", r"'logger.knd'. Did you mean 'kind'\?"),
        ("data.kcore=5", r"'data.kcore'. Did you mean 'k_core'\?"),
        ("data.columns.usr=u", r"'data.columns.usr'. Did you mean 'user'\?"),
        ("data.generator.user=5", r"'data.generator.user'. Did you mean 'users'\?"),
        ("teacher.sed=5", r"'teacher.sed'. Did you mean 'seed'\?"),
        ("teacher.lora={rnk: 4}", r"'teacher.lora.rnk'. Did you mean 'rank'\?"),
        ("stages.student.modle.layers=2", r"'stages.student.modle'. Did you mean 'model'\?"),
        ("stages.student.model.layer=2", r"'stages.student.model.layer'. Did you mean 'layers'\?"),
        ("stages.student.callbacks=[{deep_supervison: {}}]", r"Did you mean 'deep_supervision'\?"),
        ("stages.studnt.model.layers=2", r"Unknown stage 'studnt'. Did you mean 'student'\? There is: control"),
        ("~stages.exprt", r"Unknown stage 'exprt'. Did you mean 'export'\?"),
        ("stages.teachr.fit=sasrec", r"Unknown stage 'teachr'. Did you mean 'teacher'\?"),
        ("max_epochs", "'max_epochs' is not an override. Write key=value"),
        ("trainer.max_epochs:2", "is not an override"),
        ("stages.student.model={layers: [}", "does not read as a value"),
    ],
)
def test_what_is_unknown_is_named_with_the_nearest_known_name(override, message):
    with pytest.raises(UserError, match=message):
        resolve(recipes.compose("slmrec", [override]))


def test_an_option_of_a_group_that_the_recipe_does_not_have(mine):
    with pytest.raises(UserError, match="mine.*student"):
        recipes.compose(str(mine), ["student=gru4rec"])


def test_a_value_that_an_option_needs_is_asked_for():
    with pytest.raises(UserError, match=r"needs a value for 'teacher\.path'\. Add teacher\.path=VALUE"):
        recipes.compose("slmrec", ["teacher=local"])
    with pytest.raises(UserError, match=r"data\.path=FOLDER"):
        resolve(recipes.compose("slmrec", ["data=local"]))


@pytest.mark.parametrize("name", ["os", "../fit", "..fit", "items", "__init__", "torch.nn.Linear", "lit_llmers.fit", "", "."])
@pytest.mark.parametrize("room", ["backbones", "callbacks"])
def test_names_never_resolve_outside_their_room(room, name):
    with pytest.raises(UserError, match=re.escape(f"Unknown name in lit_llmers/{room} '{name}'")):
        find(room, name)


def test_a_file_whose_class_has_another_name_is_said():
    with pytest.raises(UserError, match="Unknown name .* ranking_samples.py is there, but no class RankingSamples in it"):
        find("callbacks", "ranking_samples")


def test_the_names_of_the_rooms():
    assert find("backbones", "sasrec").__name__ == "SASRec"
    assert find("backbones", "llm_decoder").__name__ == "LLMDecoder"
    assert find("callbacks", "feature_distillation").__name__ == "FeatureDistillation"
    for helper in ("resume", "progress", "throughput"):  # Lightning callbacks, but none that a recipe attaches
        with pytest.raises(UserError, match="There is: .*deep_supervision, .*feature_distillation"):
            find("callbacks", helper)
