"""SAID: the loss against one text at a time, what is trained, and what the vectors come to know."""

import numpy as np
import pytest
import torch
from tiny import by_name, small
from tiny_text import save_model
from torch.nn import functional as F

from lit_llmers.errors import UserError
from lit_llmers.models import load_dataset
from lit_llmers.running import run
from lit_llmers.teachers import language_model
from lit_llmers.text import said
from lit_llmers.text.prompts import item_texts

RECIPE = """\
# For tests.
defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  said:
    encode: said
    model: MODEL
    dim: 6
    fields: [title, categories]
    max_tokens: 12
    vocabulary: 400
    optimizer: {lr: 0.003}
"""


@pytest.fixture
def stages(tmp_path):
    def make(*overrides: str, model: str = "${teacher}", run_dir=tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text(RECIPE.replace("MODEL", model))
        return by_name(small(run_dir, *overrides, recipe=str(path)))

    return make


def prepared(planned):
    run(list(planned.values()), "prepare")
    return planned["said"]


def learner_of(stage, texts: list[str], prompt: bool = False):
    tokenizer = said.tokenizer_of(stage, load_dataset(stage))
    model = said.load_causal(said.base_with_seed(stage), tokenizer)
    torch.manual_seed(0)
    texts_of = said.Texts.of(texts, tokenizer, stage.config.max_tokens, prompt)
    learner = said.SoftTokens(stage, model, texts_of, len(texts))
    torch.nn.init.normal_(learner.items.weight.data[1:])
    return learner.eval(), texts_of, tokenizer


@pytest.mark.parametrize("prompt", [False, True])
def test_the_loss_is_that_of_each_text_alone_after_its_vector(stages, prompt):
    stage = prepared(stages())
    learner, texts, tokenizer = learner_of(
        stage, ["A red book", "", "The long story of a very long winter, part 2", "x"], prompt
    )
    assert texts.item.tolist() == [1, 3, 4]
    assert tokenizer.decode(texts.tokens[0]) == "A red book</s>"
    assert len(texts.tokens[1]) == 12
    batch = said.TextBatches(texts, 3, 0).collate(np.arange(3))
    ours = learner.token_losses(batch).split([len(tokens) for tokens in texts.tokens])
    embed = learner.model.get_input_embeddings()
    for row, item in enumerate((1, 3, 4)):
        soft = learner.projector(learner.items.weight[item])[None]
        tokens = torch.tensor(texts.tokens[row])
        x = torch.cat([embed(torch.tensor(texts.before)), soft, embed(torch.tensor(texts.after).long()), embed(tokens)])
        logits = learner.model(inputs_embeds=x[None]).logits[0, -len(tokens) - 1 : -1]
        torch.testing.assert_close(ours[row], F.cross_entropy(logits, tokens, reduction="none"), rtol=1e-4, atol=1e-5)
    assert (len(texts.after) > 0) == prompt


def test_every_vector_reaches_its_own_text_alone(stages):
    stage = prepared(stages())
    learner, texts, _ = learner_of(stage, ["A red book", "A blue book", "A green lamp"])
    learner.token_losses(said.TextBatches(texts, 3, 0).collate(np.array([0, 2]))).sum().backward()
    assert learner.items.weight.grad.any(1).tolist() == [False, True, False, True]


def test_a_frozen_base_stays_as_it_is_and_the_summary_says_what_it_cost(stages):
    stage = by_name(list(stages("trainer.max_epochs=2").values()))["said"]
    run([*stage.needs, stage], None)
    table, summary = np.load(stage.folder / "item_table.npy"), stage.summary
    texts = item_texts(load_dataset(stage).catalogue, ["title", "categories"])
    assert table.shape == (len(texts) + 1, 6)
    assert table.dtype == np.float32
    assert not table[0].any()
    assert np.mean(table[1:] ** 2) == pytest.approx(1, rel=1e-5)
    assert summary["trainable"] == (len(texts) + 1) * 6 + 6 * 16 + 16 + 16 * 16 + 16  # table and projector
    assert summary["epochs"] == 2
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["train_seconds"], rel=1e-3)
    assert not (stage.folder / "last.ckpt").exists()


def test_a_frozen_head_that_is_tied_is_in_no_checkpoint(stages):
    stage = prepared(stages("+teacher.config.tie_word_embeddings=true"))
    learner, *_ = learner_of(stage, ["a", "b"])
    learner.model.requires_grad_(False)
    checkpoint = {"state_dict": learner.state_dict()}
    learner.on_save_checkpoint(checkpoint)
    assert {name.partition(".")[0] for name in checkpoint["state_dict"]} == {"items", "projector"}


def test_trained_together_items_of_one_category_become_alike(stages):
    settings = ["trainer.max_epochs=25", "stages.said.train_base=true", "stages.said.dim=16", "stages.said.optimizer.lr=0.01"]
    stage = stages(*settings, "stages.said.fields=[categories]")["said"]
    run([*stage.needs, stage], None)
    category = load_dataset(stage).catalogue["categories"].str.split(",").str[0].to_numpy()
    table = np.load(stage.folder / "item_table.npy")[1:]
    table = table / np.linalg.norm(table, axis=1, keepdims=True)
    near = np.argsort(-(table @ table.T), axis=1)[:, 1:4]
    same = (category[near] == category[:, None]).mean()
    by_chance = np.mean(category[:, None] == category)
    assert same > by_chance + 0.2, (same, by_chance)


def test_a_killed_stage_goes_on_bit_for_bit(stages, tmp_path, monkeypatch):
    from lit_llmers.callbacks import resume

    def table(run_dir) -> np.ndarray:
        stage = stages("trainer.max_epochs=2", "stages.said.train_base=true", run_dir=run_dir)["said"]
        run([*stage.needs, stage], None)
        return np.load(stage.folder / "item_table.npy")

    whole, save, saved = table(tmp_path / "whole"), resume.save, []

    def save_and_die(trainer, path) -> None:
        save(trainer, path)
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save", save_and_die)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            table(tmp_path / "killed")
    assert saved[-1].is_file()
    assert (table(tmp_path / "killed") == whole).all()


def test_a_base_of_ones_own_brings_its_tokenizer_and_its_adapters(stages, tmp_path):
    folder = save_model("llama", tmp_path / "llama", headed=True)
    base = f"{{name: mine, path: {folder}, lora: {{rank: 2, alpha: 2, dropout: 0.0, targets: [q_proj]}}}}"
    planned = stages("trainer.max_epochs=1", "stages.said.train_base=true", model=base)
    stage = planned["said"]
    run([*stage.needs, stage], None)
    n = load_dataset(stage).n_items
    assert stage.summary["trainable"] == (n + 1) * 6 + 6 * 16 + 16 + 16 * 16 + 16 + 2 * (2 * 16 + 2 * 16)
    assert not (stage.folder / language_model.TOKENIZER).exists()
    other = stages("trainer.max_epochs=1", "stages.said.train_base=true", model=base.replace("rank: 2", "rank: 4"))["said"]
    assert other.fingerprint != stage.fingerprint


def test_how_often_it_saves_is_no_part_of_the_fingerprint(stages):
    plain, other = stages()["said"], stages("trainer.checkpoint_every=7", "trainer.log_every=9")["said"]
    assert plain.fingerprint == other.fingerprint
    assert plain.fingerprint != stages("optimizer.lr=0.5", "stages.said.trainer.max_epochs=9")["said"].fingerprint


@pytest.mark.parametrize(
    ("overrides", "model", "message"),
    [
        (["stages.said.users=history"], "${teacher}", r"encode: said does not take users: history \(use mean\)"),
        ([], "minilm", "minilm is an encoder and says nothing"),
        ([], "null", "encode: said needs a model"),
        (["stages.said.encode=transformer", "stages.said.train_base=true"], "minilm", "does not take train_base"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(stages, overrides, model, message):
    with pytest.raises(UserError, match=message):
        stages(*overrides, model=model)


def test_too_few_positions_are_refused(stages):
    stage = stages("teacher.config.max_position_embeddings=13")["said"]
    with pytest.raises(UserError, match="has 13 positions, but stage 'said' needs 14. Lower max_tokens"):
        run([*stage.needs, stage], None)
