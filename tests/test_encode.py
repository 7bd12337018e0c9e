"""The encode stage: tables of items and users, an interrupted pass, one record for several stages, and what it refuses."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import by_name, small
from tiny_text import TITLES, save_data, save_model

from lit_llmers import encode
from lit_llmers.conf.encoding import EncodeStage
from lit_llmers.data.dataset import TRAIN
from lit_llmers.errors import UserError
from lit_llmers.files import digest
from lit_llmers.models import load_dataset
from lit_llmers.report import summary_table, write_report
from lit_llmers.reporting.results import Results
from lit_llmers.running import run
from lit_llmers.signals import SignalReader
from lit_llmers.stages import FORMAT, describe
from lit_llmers.text.transformer import TextEncoder

N, U = 40, 30
RECIPE = """\
# For tests.
defaults: [/base, /data: local, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  text: {encode: transformer, model: MODEL, fields: [title, categories], missing: zero, max_tokens: 16, batch_size: 4}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts about items and users too."""
    folder = tmp_path_factory.mktemp("data") / "set"
    titles, random = save_data(folder, N, U), np.random.default_rng(1)
    knowledge = pd.DataFrame({"item_id": range(1, N + 1), "llm_text": [f"glass {title}" for title in titles]})
    for name in ("llm_item_knowledge", "llm_item_memory"):
        knowledge.to_parquet(folder / f"{name}.parquet")
    (folder / "llm_item_knowledge.json").write_text(json.dumps({"made_from": "attributes"}))
    (folder / "llm_item_memory.json").write_text(json.dumps({"made_from": "interactions"}))
    knowledge.to_parquet(folder / "llm_item_silent.parquet")
    profiles = pd.DataFrame({"user_id": range(U), "profile": random.choice(TITLES, U)})
    profiles.to_parquet(folder / "llm_user_profile.parquet")
    return folder


@pytest.fixture
def stages(tmp_path, model, data):
    """The stages of a recipe with one encode stage, `text`, and more where a test writes them."""

    def make(*overrides: str, more: str = "", run_dir=tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text(RECIPE.replace("MODEL", str(model)) + more)
        return by_name(small(run_dir, f"data.path={data}", *overrides, recipe=str(path)))

    return make


def done(planned) -> dict:
    run(list(planned.values()), None)
    return planned


def table(stage, name: str = "item_table") -> np.ndarray:
    return np.load(stage.folder / f"{name}.npy", allow_pickle=False)


def vectors(model, texts: list[str], **settings) -> np.ndarray:
    """Each text alone, by the encoder itself."""
    made = TextEncoder(EncodeStage(encode="transformer", model=str(model), max_tokens=16, **settings))
    return torch.cat([made.vectors(made.tokens([text])) for text in texts]).numpy()


def different(stage) -> int:
    """Number of different texts of its items, the empty one aside."""
    return len(set(load_dataset(stage).catalogue["title"]) - {""})


def report_of(planned) -> str:
    """The report of a run whose stages are done."""
    folder = planned["text"].run.folder
    about = {"recipe": "mine", "run": "default", "command": "", "data": planned["prepare"].summary, "pairs": []}
    (folder / "run.json").write_text(json.dumps(about | {"stages": describe(list(planned.values()))}))
    return write_report(Results(folder)).read_text()


# ---- items -----------------------------------------------------------------------------------------------------------


def test_every_item_has_the_vector_of_its_own_text(stages, model):
    text = done(stages())["text"]
    found, catalogue = table(text), load_dataset(text).catalogue
    assert found.shape == (N + 1, 16)
    assert found.dtype == np.float32
    last = catalogue.index[catalogue["item_id"] == str(N)][0] + 1
    assert np.flatnonzero(~found.any(1)).tolist() == [0, last]
    filled = np.flatnonzero(found.any(1))
    assert np.mean(found[filled] ** 2) == pytest.approx(1, rel=1e-5)
    expected = vectors(model, [f"{catalogue['title'][row - 1]}. wood" for row in filled])
    np.testing.assert_allclose(found[filled], expected * 4, rtol=1e-4, atol=1e-5)  # unit length, 16 entries of mean square 1


def test_items_of_one_text_are_read_once_and_have_one_vector(stages):
    """Read in batches of other lengths their vectors would differ in the last bits, and they would not tie in a ranking."""
    text = done(stages())["text"]
    titles, found = load_dataset(text).catalogue["title"], table(text)[1:]
    twice = [np.flatnonzero(titles == title) for title in set(titles[titles.duplicated()])]
    assert twice
    assert all((found[rows] == found[rows[0]]).all() for rows in twice)
    assert text.summary["texts"] == different(text) < N - 1


def test_the_summary_says_what_it_cost(stages):
    summary = done(stages("stages.text.max_tokens=6"))["text"].summary
    assert {key: summary[key] for key in ("items", "dim", "without_text")} == {"items": N, "dim": 16, "without_text": 1}
    assert summary["tokens"] > 0
    assert 0 < summary["cut_texts"] < N
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["encode_seconds"])
    assert len(summary["identity"]) == 12


def test_reduced_tables_keep_the_padding_and_the_size(stages):
    found = table(done(stages("stages.text.reduce=5", "stages.text.users=history"))["text"])
    assert found.shape == (N + 1, 5)
    assert not found[0].any()
    assert np.mean(found[found.any(1)] ** 2) == pytest.approx(1, rel=1e-5)


def test_all_principal_components_of_any_encoder_are_centred(stages):
    planned = done(
        stages("stages.text.reduce=all", more="  words: {encode: tfidf, fields: [title], missing: zero, dim: 8, reduce: all}\n")
    )
    for name, width in (("text", 16), ("words", 8)):
        found = table(planned[name])
        assert found.shape == (N + 1, width)
        real = found[found.any(1)]
        assert len(real) == N - 1
        np.testing.assert_allclose(real.mean(0), 0, atol=1e-4)
        assert (np.diff(real.var(0)) < 1e-6).all()
        assert np.mean(real**2) == pytest.approx(1, rel=1e-4)


def test_shuffled_is_the_same_vectors_at_other_items(stages):
    shuffled = "  shuffled: {like: text, shuffle: true}\n  again: {like: shuffled}\n"
    planned = done(stages(more=shuffled))
    plain, other = table(planned["text"]), table(planned["shuffled"])
    assert not other[0].any()
    assert (plain != other).any(1).sum() > N / 2
    assert sorted(map(bytes, plain)) == sorted(map(bytes, other))
    assert (table(planned["again"]) == other).all()


def test_stages_that_ask_the_same_of_the_same_encoder_share_its_record(stages, monkeypatch):
    asked = []
    ask = TextEncoder.vectors
    monkeypatch.setattr(TextEncoder, "vectors", lambda self, tokens: asked.append(len(tokens)) or ask(self, tokens))
    more = "  narrow: {like: text, reduce: 4}\n  other: {like: text, pooling: last}\n  titles: {like: text, fields: [title]}\n"
    planned = stages(more=more)
    counts = []
    for name in ("text", "narrow", "other", "titles"):
        run(list(planned.values()), name)
        counts.append(sum(asked))
    texts = different(planned["text"])
    assert np.diff([0, *counts]).tolist() == [texts, 0, texts, texts]
    assert planned["narrow"].summary["tokens"] == 0


def test_the_record_names_the_encoder_and_the_texts(stages):
    planned = done(stages())
    reader = SignalReader(next((planned["text"].run.folder / encode.RECORDS).iterdir()))
    assert reader.spec.teacher == planned["text"].summary["identity"]
    catalogue = load_dataset(planned["text"]).catalogue
    texts = [". ".join(cell for cell in row if cell) for row in zip(catalogue["title"], catalogue["categories"], strict=True)]
    assert reader.spec.split == digest(list(dict.fromkeys(texts)))
    assert reader.shape == (16,)


def test_of_a_damaged_record_nothing_else_is_to_be_removed(stages):
    planned = stages(more="  narrow: {like: text, reduce: 4}\n")
    run(list(planned.values()), "text")
    (record,) = (planned["text"].run.folder / encode.RECORDS).iterdir()
    (record / "shard-00000.npy").unlink()
    with pytest.raises(UserError, match=f"is missing. Remove {record.resolve()} and run"):
        run(list(planned.values()), "narrow")
    shutil.rmtree(record)
    assert done(planned)["narrow"].summary["dim"] == 4


# ---- interrupted -----------------------------------------------------------------------------------------------------


class Fault(Exception):
    """The process dies."""


@pytest.mark.parametrize("calls", [0, 3, 5])  # a shard takes two or three
def test_a_pass_that_failed_goes_on_to_the_same_bits(stages, tmp_path, monkeypatch, calls):
    monkeypatch.setattr("lit_llmers.text.vectors.SHARD_BATCHES", 2)
    whole = done(stages(run_dir=tmp_path / "whole"))["text"]
    planned = stages(run_dir=tmp_path / "other")
    asked = []
    ask = TextEncoder.vectors

    def fail_later(self, tokens):
        asked.append(tokens)
        if len(asked) > calls:
            raise Fault
        return ask(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "vectors", fail_later)
        with pytest.raises(Fault):
            done(planned)
    assert not planned["text"].done
    record = planned["text"].run.folder / encode.RECORDS
    stamps = {path: path.stat().st_mtime_ns for path in record.rglob("shard-*.npy")}
    assert len(stamps) == calls // 2
    done(planned)
    assert (planned["text"].folder / "item_table.npy").read_bytes() == (whole.folder / "item_table.npy").read_bytes()
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "whole shards are not made again"
    assert planned["text"].summary["tokens"] < whole.summary["tokens"] or not calls


# ---- users -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["tfidf", "transformer"])
def test_mean_of_the_training_items(stages, encoder):
    more = "  words: {encode: tfidf, missing: zero, dim: 3, users: mean}\n"
    planned = done(stages("stages.text.users=mean", more=more))
    stage = planned["words" if encoder == "tfidf" else "text"]
    items, users, dataset = table(stage), table(stage, "user_table"), load_dataset(stage)
    assert users.dtype == np.float32
    assert len(users) == dataset.n_users == U + 1
    for user in range(dataset.n_users):
        place = slice(dataset.offsets[user], dataset.offsets[user + 1])
        own = items[dataset.items[place][dataset.split[place] == TRAIN]]
        own = own[own.any(1)]
        np.testing.assert_allclose(users[user], own.mean(0) if len(own) else 0, rtol=1e-4, atol=1e-5)


def test_history_is_the_encoded_titles_of_the_training_items(stages, model):
    text = done(stages("stages.text.users=history", "stages.text.user_prompt='user chose {history}'"))["text"]
    users, dataset = table(text, "user_table"), load_dataset(text)
    assert users.shape == (U + 1, 16)
    titles = dataset.catalogue["title"].tolist()
    compared = 0
    for user in range(U):
        place = slice(dataset.offsets[user], dataset.offsets[user + 1])
        own = [titles[item - 1] for item in dataset.items[place][dataset.split[place] == TRAIN]]
        prompt = "user chose " + "; ".join(title for title in own if title)
        if any(own) and len(prompt.replace(";", " ;").split()) <= 14:  # and the two tokens around it
            np.testing.assert_allclose(users[user], vectors(model, [prompt])[0] * 4, rtol=1e-3, atol=1e-4)
            compared += 1
    assert compared > 3


def test_profile_is_the_encoded_text_about_the_user(stages, model):
    leaking = ["data.texts=[llm_user_profile]", "stages.text.allow_leaking=[llm_user_profile]"]
    text = done(stages(*leaking, "stages.text.users=profile", "stages.text.profile=llm_user_profile"))["text"]
    users, dataset = table(text, "user_table"), load_dataset(text)
    profiles = dataset.user_texts["llm_user_profile"]
    np.testing.assert_allclose(users[:5], vectors(model, profiles[:5].tolist()) * 4, rtol=1e-3, atol=1e-4)
    assert profiles[U] == ""
    assert not users[U].any()
    assert text.summary["users_without_vector"] == 1
    assert text.summary["leaking"] == ["llm_user_profile"]


# ---- what may have seen held-out items -------------------------------------------------------------------------------


def test_a_text_of_items_is_a_field(stages):
    text = done(stages("data.texts=[llm_item_knowledge]", "stages.text.fields=[llm_item_knowledge]"))["text"]
    assert "leaking" not in text.summary
    assert table(text)[1:].any(1).all(), "every item has such a text"


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llm_item_memory", ["stages.text.fields=[title,llm_item_memory]"]),
        ("llm_item_silent", ["stages.text.fields=[title,llm_item_silent]"]),
        ("llm_user_profile", ["stages.text.users=profile", "stages.text.profile=llm_user_profile"]),
    ],
)
def test_a_text_that_may_have_seen_held_out_items_is_refused_unless_allowed(stages, name, overrides):
    message = rf"'{name}' was or may have been written from users' interactions.*set stages\.text\.allow_leaking=\[{name}\]"
    with pytest.raises(UserError, match=message):  # before anything runs
        stages(f"data.texts=[{name}]", *overrides, "stages.text.allow_leaking=[other]")
    planned = done(stages(f"data.texts=[{name}]", *overrides, f"stages.text.allow_leaking=[{name}]"))
    warning = f"WARNING: held-out items may have been seen.** Stage 'text' reads `{name}`"
    report = report_of(planned)
    assert warning in report
    assert report.index(warning) < report.index("## "), "at the head of the report"
    assert warning.replace("**", "") in summary_table(Results(planned["text"].run.folder))


def test_a_tuned_model_reads_no_such_text_either_unless_it_is_allowed(stages):
    more = "  tuned: {tune: bigrec, base: '${teacher}', fields: [title, llm_item_memory], samples: 8, validation_users: 4}\n"
    given = ["data.texts=[llm_item_memory]", "trainer.max_epochs=1"]
    with pytest.raises(UserError, match=r"'llm_item_memory' was or may .*set stages\.tuned\.allow_leaking=\[llm_item_memory\]"):
        stages(*given, more=more)
    planned = done(stages(*given, "stages.tuned.allow_leaking=[llm_item_memory]", more=more))
    assert "Stage 'tuned' reads `llm_item_memory`" in report_of(planned)


def test_no_warning_without_such_a_text(stages):
    assert "held-out items may" not in report_of(done(stages()))


def test_a_text_of_users_is_no_field_and_must_be_there(stages):
    allowed = "stages.text.allow_leaking=[llm_user_profile]"
    with pytest.raises(UserError, match="'llm_user_profile' .* is a text of users. Encode it with users: profile"):
        done(stages("data.texts=[llm_user_profile]", "stages.text.fields=[llm_user_profile]", allowed))
    with pytest.raises(UserError, match=r"Unknown text of users \(profile\).*'llm_user_profile'"):
        done(stages("stages.text.users=profile", "stages.text.profile=llm_user_profile", allowed))


# ---- who has no text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "of", "message"),
    [
        (
            ["fields=[title,categories]"],
            "text",
            r"1 of 40 items have no text to encode in title, categories \(fields\), first '40' \(no title\)",
        ),
        (["fields=[title]"], "words", r"1 of 40 items have no text to encode in title \(fields\), first '40' \(no title\)"),
        (
            ["fields=[llm_item_some]"],
            "text",
            r"37 of 40 items .* llm_item_some \(fields\), first '\d+' \(\w.*\), '\d+' \(.*\. Name",
        ),
        (["fields=[llm_item_letter]"], "words", r"1 of 40 items .* llm_item_letter \(fields\), first '3'"),  # no word of TF-IDF
        (
            ["fields=[llm_item_knowledge]", "users=profile", "profile=llm_user_profile", "allow_leaking=[llm_user_profile]"],
            "text",
            r"1 of 31 users have no text to encode in llm_user_profile \(profile\), first '30'\. Encode users",
        ),
    ],
)
def test_without_text_is_refused_unless_the_stage_says_what_holds_then(stages, data, overrides, of, message):
    knowledge = pd.read_parquet(data / "llm_item_knowledge.parquet")
    knowledge[:3].to_parquet(data / "llm_item_some.parquet")
    knowledge.replace({"llm_text": {knowledge["llm_text"][2]: "a"}}).to_parquet(data / "llm_item_letter.parquet")
    given = ["data.texts=[llm_item_knowledge,llm_item_some,llm_item_letter,llm_user_profile]"]
    given.append("data.made_from={llm_item_some: attributes, llm_item_letter: attributes}")
    given += [f"stages.{of}.{override}" for override in overrides]
    words = "  words: {encode: tfidf, dim: 2}\n" if of == "words" else ""
    refused = stages(*given, f"stages.{of}.missing=refuse", more=words)
    run(list(refused.values()), "prepare")
    with pytest.raises(UserError, match=rf"Stage '{of}': {message}.*or set stages\.{of}\.missing=zero"):
        run([refused[of]], None)
    assert not (refused[of].folder / "item_table.npy").exists()
    assert not (refused[of].run.folder / encode.RECORDS).exists(), "found before anything is encoded"
    run([stages(*given, f"stages.{of}.missing=zero", more=words)[of]], None)


def test_the_report_counts_who_has_no_vector_and_what_was_read(stages, model):
    planned = done(stages("stages.text.users=mean"))
    (line,) = [line for line in report_of(planned).splitlines() if line.startswith(f"| text | 0 | {model.name} |")]
    tokens = f"{planned['text'].summary['tokens']:,}"
    assert f"| {N} | 1 | {U + 1} | 0 | {different(planned['text'])} | {tokens} | " in line


def test_a_recipe_s_choice_of_text_takes_the_fallback(tmp_path):
    assert by_name(small(tmp_path, "text.missing=zero", "text.dim=64", recipe="llm2x"))["text"].config.missing == "zero"


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_that_came_later_leave_old_names_alone(stages):
    """The names of prepared data and of text tables that were made before there were other encoders and texts."""
    planned = stages(more="  words: {encode: tfidf, dim: 8}\n")
    prepare, words = planned["prepare"], planned["words"]
    before = {"encode": "tfidf", "fields": ["title", "categories", "text"], "dim": 8}
    assert words.fingerprint == digest([FORMAT, "encode", before, 0, {}, [prepare.fingerprint]])
    settings = {
        key: value for key, value in asdict(prepare.config).items() if key not in ("root", "path", "texts", "made_from")
    }
    assert prepare.fingerprint == digest([FORMAT, "prepare", settings, 0, prepare.content, []])


def test_the_model_s_content_names_the_stage_and_its_place_does_not(stages, model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    before = stages()["text"].fingerprint
    assert stages(f"stages.text.model={copy}")["text"].fingerprint == before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    assert stages(f"stages.text.model={copy}")["text"].fingerprint != before
    assert stages("stages.text.users=mean")["text"].fingerprint != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encode": "transformers", "model": "x"}, "Unknown .*'transformers'. Did you mean 'transformer'"),
        ({"pooling": "men"}, "'men'. Did you mean 'mean'"),
        ({"users": "histories"}, "'histories'. Did you mean 'history'"),
        ({"reduce": 0}, "reduce of the encode stage is 0"),
        ({"reduce": "most"}, "reduce of the encode stage is 'most'. It must be a number of components, or all"),
        ({"model": None}, "encode: transformer needs a model"),
        ({"encode": "tfidf"}, "encode: tfidf has no model"),
        ({"encode": "tfidf", "model": None, "reduce": 8}, r"does not take reduce \(use dim\)"),
        ({"whiten": True}, "whiten .* is of principal components. Say how many, as reduce: 128"),
        ({"encode": "tfidf", "model": None, "users": "history"}, r"does not take users: history \(use mean\)"),
        ({"users": "profile"}, "goes with profile: NAME"),
        ({"missing": "zeros"}, "'zeros'. Did you mean 'zero'"),
        ({"profile": "llm_user_profile"}, "goes with profile: NAME"),
        ({"fields": []}, "fields of the encode stage is empty"),
        ({"user_prompt": "{history}"}, "user_prompt .* has no effect: it belongs to users: history"),
        ({"encode": "tfidf", "model": None, "pooling": "last"}, "pooling=last .* set it to mean, .* transformer"),
        ({"encode": "tfidf", "model": None, "max_tokens": 9}, "max_tokens=9 .* no effect with encode: tfidf"),
        ({"dim": 32}, "dim=32 .* with encode: transformer. Leave it out, set it to 64, or choose encode: tfidf or said"),
        ({"encode": "said", "normalise": False}, "normalise=False .* no effect with encode: said"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        EncodeStage(**{"encode": "transformer", "model": "minilm"} | settings)


def test_a_wrong_prompt_is_found_before_anything_runs(stages):
    with pytest.raises(UserError, match=r"Unknown field in braces \(stages\.text\.prompt\) 'titel'"):
        stages("stages.text.prompt='Item {titel}'")


def test_no_text_at_all(stages):
    with pytest.raises(UserError, match="item texts hold no word"):
        done(stages("stages.text.fields=[text]"))


@pytest.mark.parametrize("settings", ["encode: transformer, model: MODEL", "encode: tfidf, dim: 1"])
def test_texts_that_are_all_the_same_are_refused(stages, model, settings):
    """Their vectors differ in rounding alone, which a start of a given deviation would blow up."""
    words = f"  words: {{{settings}, fields: [categories], missing: zero}}\n".replace("MODEL", str(model))
    with pytest.raises(UserError, match=r"'words': the 39 items .* in categories \(fields\) all have the same, 'wood'"):
        done(stages(more=words))
