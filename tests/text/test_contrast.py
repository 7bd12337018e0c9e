"""Contrastive tuning of a text encoder: its views, its loss, and what it leaves behind."""

import errno
import os

import numpy as np
import pytest
import torch
from tiny import by_name, small
from tiny_text import TITLES, save_model
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.bert.modeling_bert import BertIntermediate

from lit_llmers.conf.encoding import ContrastConfig, EncodeStage
from lit_llmers.errors import UserError
from lit_llmers.models import load_dataset
from lit_llmers.running import run
from lit_llmers.text.contrast import Fields, TwoViews, ViewBatches
from lit_llmers.text.transformer import TextEncoder

RECIPE = """\
# For tests.
defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  text:
    encode: transformer
    model: MODEL
    fields: [title, categories, text]
    max_tokens: 16
    contrast: {}
    optimizer: {lr: 0.003}
  plain: {like: text, contrast: null}
"""
LORA = "stages.text.contrast.lora={rank: 2, alpha: 4, dropout: 0.0, targets: [query, value]}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def stages(tmp_path, model):
    def make(*overrides: str, run_dir=tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text(RECIPE.replace("MODEL", str(model)))
        return by_name(small(run_dir, "trainer.max_epochs=2", "data.generator.items=60", *overrides, recipe=str(path)))

    return make


def done(planned):
    run(list(planned.values()), None)
    return planned


def table(stage) -> np.ndarray:
    return np.load(stage.folder / "item_table.npy")


def test_a_view_is_three_of_five_fields_in_any_order():
    rows = Fields([list("abcde"), ["a", "b"], ["only"]], 0.4)
    random = np.random.default_rng(0)
    views = [rows.view(0, random).split(". ") for _ in range(200)]
    assert all(len(set(view)) == len(view) == 3 and set(view) <= set("abcde") for view in views)
    assert len(set(map(tuple, views))) > 45, "of 60 orders"
    assert {rows.view(1, random) for _ in range(20)} == {"a. b", "b. a"}, "of two fields none is left out"
    assert rows.view(2, random) == "only"


def test_batches_are_drawn_anew_each_epoch_and_belong_to_their_seed(stages):
    encoder = TextEncoder(stages()["text"].config)
    rows = Fields([["red lamp", "wood", "a story", "garden", "winter"]] * 8, 0.4)

    def drawn(seed: int, epoch: int) -> list[list[int]]:
        batches = ViewBatches(rows, 4, seed)
        batches.encoder = encoder
        batches.set_epoch(epoch)
        return [batch["tokens"].tolist() for batch in batches]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(0, 1) != drawn(1, 1)
    first = drawn(0, 0)[0]
    assert first[:4] != first[4:], "two views of an item are drawn independently"


def test_the_loss_is_soft_clip_of_vectors_that_are_not_normalised(stages):
    stage = stages("stages.text.contrast.temperature=2.0")["text"]
    encoder = TextEncoder(stage.config)
    learner = TwoViews(stage, encoder).eval()
    views = ["red lamp", "wood chair", "garden", "lamp red", "wood", "winter garden"]
    tokens, mask = encoder.padded(encoder.tokens(views))
    x, y = encoder.pooled(tokens, mask).double().chunk(2)
    s, p = x @ y.T / 2, ((x @ x.T + y @ y.T) * (2 / 2)).softmax(1)
    expected = -((p * s.log_softmax(1)).sum(1).mean() + (p.T * s.T.log_softmax(1)).sum(1).mean()) / 2
    torch.testing.assert_close(learner.loss({"tokens": tokens, "mask": mask}).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [True, False])
def test_the_tuned_encoder_makes_the_table_and_is_kept_for_others(stages, lora, model):
    planned = done(stages(*([LORA] if lora else [])))
    text, plain = planned["text"], planned["plain"]
    assert np.abs(table(text) - table(plain)).max() > 1e-3
    assert text.summary["epochs"] == 2
    assert "trainable" not in plain.summary
    if lora:
        assert text.summary["trainable"] == 2 * 2 * 2 * (2 * 16) + 1  # two layers, query and value, A and B; the temperature
        kept = EncodeStage("transformer", model=str(model), adapter=str(text.folder / "adapter"), max_tokens=16)
    else:
        kept = EncodeStage("transformer", model=str(text.folder / "model"), max_tokens=16)
    encoder, catalogue = TextEncoder(kept), load_dataset(text).catalogue
    texts = [". ".join(row) for row in zip(catalogue["title"], catalogue["categories"], catalogue["text"], strict=True)]
    again = encoder.vectors(encoder.tokens(texts[:5])).numpy() * 4  # unit length, 16 entries of mean square 1
    np.testing.assert_allclose(table(text)[1:6], again, rtol=1e-3, atol=1e-4)
    assert not (text.folder / "last.ckpt").exists()


@pytest.mark.parametrize("cls", [PreTrainedModel, PreTrainedTokenizerBase])
def test_a_disk_that_is_full_when_the_tuned_encoder_is_kept(stages, cls, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cls, "save_pretrained", full)
    planned = stages("trainer.max_epochs=1")
    with pytest.raises(UserError, match=r"No space left on the disk while writing .*model.* the same command again"):
        done(planned)
    assert not planned["text"].done


@pytest.mark.parametrize("lora", [True, False])
def test_layers_that_are_recomputed_end_in_the_same_vectors(stages, tmp_path, lora, monkeypatch):
    own, passes, forward = [LORA] if lora else [], [], BertIntermediate.forward

    def counted(*args, **kwargs):
        passes.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(BertIntermediate, "forward", counted)
    kept = done(stages(*own))["text"]
    once = len(passes)
    again = done(stages(*own, "+stages.text.contrast.gradient_checkpointing=true", run_dir=tmp_path / "again"))["text"]
    assert len(passes) - once > once, "layers run again in the backward pass"
    np.testing.assert_allclose(table(again), table(kept), atol=1e-6)


def test_tuning_brings_the_views_of_an_item_together(stages):
    stage = stages()["text"]
    encoder = TextEncoder(stage.config)
    encoder.model.requires_grad_(True)
    random = np.random.default_rng(0)
    rows = Fields([[" ".join(random.choice(TITLES, 2)) for _ in range(4)] for _ in range(40)], 0.4)
    learner, batches = TwoViews(stage, encoder), ViewBatches(rows, 20, 0)
    batches.encoder = encoder

    def found() -> float:
        """Share of items whose second view is the nearest of its first, in an epoch that is not trained on."""
        batches.set_epoch(1000)
        pairs = [encoder.pooled(batch["tokens"], batch["mask"]).detach().chunk(2) for batch in batches]
        hits = [(x @ F.normalize(y).T).argmax(1) == torch.arange(len(x)) for x, y in pairs]
        return torch.cat(hits).float().mean().item()

    before, adam = found(), torch.optim.AdamW(learner.parameters(), lr=0.01)
    for epoch in range(60):
        batches.set_epoch(epoch)
        for batch in batches:
            adam.zero_grad()
            learner.loss(batch).backward()
            adam.step()
    assert found() > before + 0.2, (before, found())


def test_a_killed_stage_goes_on_bit_for_bit(stages, tmp_path, monkeypatch):
    from lit_llmers.callbacks import resume

    whole, save, saved = table(done(stages(LORA, run_dir=tmp_path / "whole"))["text"]), resume.save, []

    def save_and_die(trainer, path) -> None:
        save(trainer, path)
        saved.append(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save", save_and_die)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            done(stages(LORA, run_dir=tmp_path / "killed"))
    assert saved[0].is_file()
    assert (table(done(stages(LORA, run_dir=tmp_path / "killed"))["text"]) == whole).all()


@pytest.mark.parametrize(
    "settings", [{"fields": ["title"]}, {"prompt": "{title}"}, {"adapter": "somewhere"}, {"encode": "tfidf", "model": None}]
)
def test_what_cannot_be_is_refused(settings):
    with pytest.raises(UserError, match="contrast"):
        EncodeStage(**{"encode": "transformer", "model": "minilm", "contrast": ContrastConfig()} | settings)
    with pytest.raises(UserError, match=r"contrast.drop is 1.0"):
        ContrastConfig(drop=1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(UserError, match=rf"^contrast\.temperature is {temperature}\. It must be positive\.$"):
        ContrastConfig(temperature=temperature)
