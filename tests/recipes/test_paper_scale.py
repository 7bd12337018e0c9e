"""Every recipe at its paper's scale: each training stage takes two steps, with a tiny model in place of each large one.

What is cut is the size of data, models and lists. Stages, losses, callbacks and how a stage reads another are the paper's.
"""

import shutil
from pathlib import Path

import pytest
import torch
from tiny import by_name, losses
from tiny_text import DECODER, ENCODER

from lit_llmers import recipes
from lit_llmers.composing.resolving import resolve
from lit_llmers.data.dataset import Dataset
from lit_llmers.running import run
from lit_llmers.stages import Stage

SCALED = [name for name in sorted(recipes.available()) if "paper:" in recipes.find(name).read_text()]
CUT = [
    "scale=paper",
    "logger=csv",
    "data.generator.users=60",
    "data.generator.items=80",
    "data.generator.longest=20",
    "evaluation.users=20",
    "sequences.max_length=8",
    "sequences.targets_per_user=2",
    "trainer.batch_size=16",
    "trainer.accumulate_grad_batches=1",
    "trainer.max_epochs=1",
    "trainer.validate_every=1",
    "trainer.limit_train_batches=2",
    "trainer.log_every=1",
    "trainer.precision=32-true",
]
LLM = ["teacher.path=null", "teacher.dtype=float32", "teacher.attention=null"]
LLM += [f"teacher.config={{model_type: llama, vocab_size: 3, {', '.join(f'{k}: {v}' for k, v in DECODER.items())}}}"]
TUNED = ["stages.teacher.samples=32", "stages.teacher.validation_users=8", "stages.teacher.vocabulary=200"]
TUNED += ["stages.teacher.generation={num_beams: 2, max_new_tokens: 4, batch_size: 64}", "stages.teacher.max_tokens=64"]
CUT_MORE = {
    "slmrec": ["teacher.config.num_hidden_layers=8"],
    "llm-esr": ["student.model.dim=16"],  # as wide as the tiny text models
    "llm2x": ["student.model.dim=16"],
    "llminit": ["student.model.dim=16"],
    "llmemb": ["stages.text.reduce=8", "stages.text.max_tokens=64"],
    "said": ["stages.said.max_tokens=16", "stages.said.vocabulary=200"],
    **{name: ["stages.lists.k=60"] for name in ("cd", "dcd", "dllm2rec", "rd", "rrd", "soft-top-k", "unkd")},
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny text models that know the words of the generated catalogue: a BERT and a Llama."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoders")
    prepare, *_ = resolve(recipes.compose("student", [*CUT[1:5], f"run.dir={folder}"]))
    run([prepare], None)
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"cls_token": "<s>", "bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    trainer = trainers.WordLevelTrainer(special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    words.train_from_iterator(Dataset.load(prepare.folder).catalogue["title"], trainer)
    for kind, sizes in {"bert": ENCODER, "llama": DECODER}.items():
        sizes = sizes | {"max_position_embeddings": 512, "vocab_size": words.get_vocab_size(), "pad_token_id": 1}
        torch.manual_seed(0)
        AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder / kind)
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in ("bert", "llama")}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Where stages that are done lie, for the recipes that share them."""
    folder = tmp_path_factory.mktemp("done")
    yield folder
    shutil.rmtree(folder)


def given(name: str, folder: Path, encoders: dict[str, Path]) -> list[str]:
    """The recipe's overrides, with every model of the hub replaced."""
    config = recipes.compose(name, ["scale=paper"])
    out = [*CUT, f"run.dir={folder}", *LLM, *CUT_MORE.get(name, [])]
    for stage, settings in config["stages"].items():
        settings = settings | settings["like"] if isinstance(settings.get("like"), dict) else settings
        if settings.get("encode") == "transformer":
            kind = "bert" if settings["model"].startswith(("google-bert", "BAAI", "sentence")) else "llama"
            assert not Path(settings["model"]).exists(), "a hub name"
            out += [f"stages.{stage}.model={encoders[kind]}", f"stages.{stage}.dtype=float32"]
        if "tune" in settings:
            out += TUNED
    return out


def link(stage: Stage, done: Path) -> None:
    """Take the stage over from a recipe that has done it: the same name is the same content."""
    twin = next((path.parent for path in done.glob(f"*/*/{stage.folder.name}/DONE")), None)
    if twin is not None and not stage.folder.exists():
        stage.folder.parent.mkdir(parents=True, exist_ok=True)
        stage.folder.symlink_to(twin.resolve())


def test_every_recipe_has_the_scale():
    assert set(recipes.available()) == set(SCALED)


@pytest.mark.parametrize("name", SCALED)
def test_every_training_stage_takes_two_steps(name, done, encoders):
    stages = resolve(recipes.compose(name, given(name, done, encoders)))
    stages = [stage for stage in stages if stage.verb not in ("evaluate", "export")]
    for stage in stages:
        link(stage, done)
    run(stages, None)
    trained = [stage for stage in stages if getattr(stage.config, "trainer", None) and stage.name != "popularity"]
    assert {"student", "control"} <= set(by_name(trained)) or name == "student"
    for stage in trained:
        logged = losses(stage, "loss")
        assert len(logged) == 2, stage.name
        assert all(map(torch.isfinite, map(torch.tensor, logged))), stage.name
