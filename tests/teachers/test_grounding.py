"""What a language model says, and the items that are meant by it."""

import errno
import os
import signal

import numpy as np
import pytest
import torch
from test_resume import KillAfter, Killed, link
from tiny import assert_equal_weights, by_name, small, weights
from titles import LORA, TITLES, as_if_tuned, language_model, settings, titled, wording_of

from lit_llmers import preemption, record, tuning
from lit_llmers.conf.instruction import GenerationConfig
from lit_llmers.data.sequences import EvaluationRows, TrainingRows
from lit_llmers.errors import UserError
from lit_llmers.journal import read_journal
from lit_llmers.models import load_dataset, load_model
from lit_llmers.record import open_signals
from lit_llmers.running import run
from lit_llmers.teachers.base import BaseConfig, load_causal, load_tokenizer
from lit_llmers.teachers.grounding import GroundedRecommender, Trie
from lit_llmers.teachers.instruct import InstructedModel
from lit_llmers.teachers.lora import with_lora
from lit_llmers.teachers.wording import Wording, pad_left

HISTORIES = [[1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13, 14, 15], [2, 4, 6]]
ASKED = [[1], [2, 3], [15, 14, 13, 12, 11, 10], [4, 5, 6]]


def ranker_of(data, lora=None, base=None, **config) -> GroundedRecommender:
    wording = wording_of(data)
    return GroundedRecommender(as_if_tuned(language_model(wording, lora)), wording, GenerationConfig(**config), base).eval()


def batch_of(histories) -> dict[str, torch.Tensor]:
    items, mask = pad_left(histories, 0)
    return {"items": items, "mask": mask}


# ---- saying ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_batch_of_mixed_lengths_says_what_each_says_alone(num_beams):
    rankers = [ranker_of(titled(HISTORIES), num_beams=num_beams, batch_size=size, max_new_tokens=9) for size in (1, 3)]
    alone, together = (ranker.say(ASKED) for ranker in rankers)
    assert alone == together
    assert len(set(alone)) > 1
    assert rankers[1].work.asked == 4
    assert rankers[1].work.said == rankers[0].work.said
    rankers[1].say([*ASKED, ASKED[0]])
    assert rankers[1].work.asked == 4, "what was said is remembered"


def test_what_was_said_is_known_again_batch_by_batch(tmp_path):
    data, asked = titled(HISTORIES), [[[1, 2], [3]], [[4], [5, 6]]]
    whole = ranker_of(data)
    expected = [whole.say(each) for each in asked]
    first, again = ranker_of(data), ranker_of(data)
    first.keep(tmp_path / "said.jsonl")
    first.say(asked[0])
    with open(tmp_path / "said.jsonl", "a") as file:
        file.write('{"prompts": "torn')
    again.keep(tmp_path / "said.jsonl")
    assert [again.say(each) for each in asked] == expected
    assert again.work.before == first.work.seconds < again.work.seconds
    assert (again.work.asked, again.work.said, again.work.exact) == (whole.work.asked, whole.work.said, whole.work.exact)
    assert len(read_journal(tmp_path / "said.jsonl")) == 2


def test_a_model_that_says_nothing_says_no_title_though_an_item_has_none():
    ranker = ranker_of(titled(HISTORIES, [*TITLES, ""]), num_beams=1, embedder="tuned")
    ranker._best_beams = lambda prompts: [[ranker.wording.end] for _ in prompts]
    ranker.say(ASKED)
    assert ranker.work.exact == 0
    items, scores = ranker.top_items(batch_of(ASKED), 16)
    assert items[:, -1].tolist() == [16] * 4, "what has no title is not what was meant by saying nothing"
    assert (scores[:, -1] < scores[:, -2]).all()
    title = ranker.wording.response(3)
    ranker.forget()
    ranker._best_beams = lambda prompts: [title for _ in prompts]
    ranker.say(ASKED)
    assert ranker.work.exact == len(ASKED)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_constrained_to_the_catalogue_nothing_else_is_said(num_beams):
    asked = [[a, b] for a in range(1, 15) for b in (3, 7)]
    free, bound = (ranker_of(titled(HISTORIES), num_beams=num_beams, constrained=each).say(asked) for each in (False, True))
    assert not set(free) & set(TITLES), "random weights do not say titles by themselves"
    assert set(bound) <= set(TITLES)
    assert len(set(bound)) > 1


def test_of_all_titles_the_constrained_beams_find_the_likeliest():
    """With more beams than titles nothing is pruned: against the mean log-likelihood of the tokens of every title."""
    data = titled(HISTORIES)
    ranker = ranker_of(data, num_beams=20, constrained=True)
    prompts = ranker.wording.prompts(ASKED)
    for prompt, said in zip(prompts, ranker.say(ASKED), strict=True):
        likelihood = {}
        for item, title in enumerate(TITLES, 1):
            response = ranker.wording.response(item)
            logits = ranker.backbone(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]
            likelihood[title] = chosen.mean().item()
        assert said == max(likelihood, key=likelihood.__getitem__)


def test_a_trie_knows_what_may_follow():
    trie = Trie([[1, 2, 9], [1, 3, 9], [4, 9]], end=9)
    assert trie.after([]) == [1, 4]
    assert trie.after([1]) == [2, 3]
    assert trie.after([1, 3]) == trie.after([1, 3, 9]) == trie.after([7, 7]) == [9]


GPT2 = {"name": "short", "config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}}
LONG = [*TITLES, " ".join(f"part {number}" for number in range(40))]


def of_64_positions(**generation) -> GroundedRecommender:
    wording = wording_of(titled(HISTORIES, LONG), max_tokens=64, instruction="x")
    model = load_causal(BaseConfig.of(GPT2), wording.tokenizer).eval()
    return GroundedRecommender(model, wording, GenerationConfig(embedder="tuned", **generation))


def test_what_is_said_ends_where_the_positions_do():
    ranker = of_64_positions(num_beams=1)
    assert ranker.wording.longest > 64
    prompts = ranker.wording.prompts([[1], [2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])
    assert ranker.limit == 64 - ranker.wording.longest_prompt
    assert [len(said) for said in ranker.generate(prompts)] == [ranker.limit, ranker.limit]
    assert len(of_64_positions(num_beams=2, max_new_tokens=5).generate(prompts)[0]) == 5


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"max_new_tokens": 500}, "max_new_tokens is 500, but a prompt of max_tokens leaves 32 of the base's 64 positions"),
        ({"constrained": True}, "with generation.constrained whole titles are said. Lower max_tokens"),
        ({"constrained": True, "max_new_tokens": 4}, r"takes [0-9]+ tokens, but generation.max_new_tokens is 4.*Choose [0-9]+"),
    ],
)
def test_what_does_not_fit_the_positions_or_the_titles_is_refused(generation, message):
    with pytest.raises(UserError, match=message):
        of_64_positions(**generation)


def test_a_padding_token_that_only_the_tokenizer_knows_is_never_read(llama, tmp_path):
    import shutil

    titles = [f"{first} {second}" for first in ("Tell", "item", "user") for second in ("next", "far", "so")]
    data = titled([[1, 2, 3, 4, 5]], titles)
    said = []
    for folder, pads in ((llama, False), (shutil.copytree(llama, tmp_path / "base"), True)):
        base = BaseConfig.of({"name": "tiny", "path": str(folder)})
        tokenizer = load_tokenizer(base)
        if pads:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        wording = Wording(tokenizer, data, settings(base={"name": "tiny", "path": str(folder)}))
        asked = GenerationConfig(num_beams=2, max_new_tokens=6, embedder="tuned")
        ranker = GroundedRecommender(load_causal(base, tokenizer).eval(), wording, asked)
        said.append((ranker.say([[1], [2, 3], [4, 5, 6]]), ranker.tables().table))
    assert said[0][0] == said[1][0]
    assert torch.equal(said[0][1], said[1][1])


# ---- grounding -------------------------------------------------------------------------------------------------------


def vectors_by_hand(model, wording, texts) -> np.ndarray:
    """The last token's state after the last layer, one text at a time and without padding."""
    rows = [model(input_ids=torch.tensor([wording.title(text)]), output_hidden_states=True) for text in texts]
    return torch.stack([row.hidden_states[-1][0, -1] for row in rows]).detach().double().numpy()


@pytest.mark.parametrize(("embedder", "lora"), [("base", LORA), ("tuned", LORA), ("tuned", None), ("base", None)])
def test_ranks_and_lists_are_those_of_all_distances_by_hand(embedder, lora):
    titles = [*TITLES, TITLES[3], ""]  # items 4 and 16 bear the same title, item 17 none
    data = titled([*HISTORIES, [16, 17, 1]], titles)
    wording = wording_of(data)
    untouched = language_model(wording)
    ranker = ranker_of(data, lora, base=untouched if embedder == "base" and not lora else None, embedder=embedder, num_beams=2)
    said = ranker.say(ASKED)
    by_hand = untouched if embedder == "base" else ranker.backbone
    distance = np.linalg.norm(
        vectors_by_hand(by_hand, wording, said)[:, None] - vectors_by_hand(by_hand, wording, titles)[None], axis=2
    )
    sizes = [np.linalg.norm(vectors_by_hand(by_hand, wording, texts), axis=1) for texts in (said, titles[:-1])]
    distance[:, 16] = sizes[0] + sizes[1].max()
    batch = batch_of(ASKED) | {"target": torch.tensor([4, 16, 3, 17])}
    batch |= {"seen_row": torch.tensor([0, 1, 1, 2, 3, 3]), "seen_item": torch.tensor([1, 2, 3, 5, 4, 5])}
    ranks, (items, scores) = ranker.ranks(batch), ranker.top_items(batch, 17)
    for row, target in enumerate([4, 16, 3, 17]):
        seen = batch["seen_item"][batch["seen_row"] == row].numpy()
        left = np.setdiff1d(np.arange(1, 18), seen)
        own, others = distance[row, target - 1], distance[row, np.setdiff1d(left, target) - 1]
        ties = np.isclose(others, own, rtol=1e-9, atol=1e-9)
        assert ties.sum() == (target in (4, 16) and {4, 16} <= set(left))
        assert ranks[row] == ((others < own) & ~ties).sum() + ties.sum() / 2
        listed = items[row][items[row] > 0].numpy()
        assert sorted(listed) == left.tolist()
        np.testing.assert_allclose(-scores[row, : len(left)], np.sort(distance[row, left - 1]), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(-scores[row, : len(left)], distance[row, listed - 1], rtol=1e-4, atol=1e-5)
        assert (scores[row, len(left) :] == -torch.inf).all()
    embedded = ranker.embed(ranker.titles)
    assert torch.equal(embedded[3], embedded[15])
    competing = torch.tensor([[1, 2], [4, 5], [6, 7], [8, 9]])
    chosen = distance[np.arange(4)[:, None], competing.numpy() - 1] < distance[np.arange(4), [3, 15, 2, 16]][:, None]
    same = np.array([[0, 0], [1, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(ranker.ranks(batch, None, competing), (chosen * (1 - same) + same / 2).sum(1))


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_base_on_disk_says_and_grounds_with_its_own_tokenizer(llama, lora):
    """Which has no token for padding."""
    data = titled(HISTORIES, [title.replace("Red", "Tell").replace("Sea", "item") for title in TITLES])
    base = BaseConfig.of({"name": "tiny", "path": str(llama), "lora": lora})
    wording = Wording(load_tokenizer(base), data, settings(base={"name": "tiny", "path": str(llama)}))
    assert wording.tokenizer.pad_token_id is None
    model = load_causal(base, wording.tokenizer)
    model = (with_lora(model, base.lora) if lora else model).eval()
    rankers = [
        GroundedRecommender(model, wording, GenerationConfig(num_beams=2, max_new_tokens=6, embedder="tuned", batch_size=size))
        for size in (1, 4)
    ]
    assert rankers[0].say(ASKED) == rankers[1].say(ASKED)
    batch = batch_of(ASKED) | {"target": torch.tensor([1, 2, 3, 4])}
    assert torch.equal(rankers[0].ranks(batch), rankers[1].ranks(batch))


def test_after_a_validation_no_title_stays_beside_what_trains(monkeypatch):
    ranker, logged = ranker_of(titled(HISTORIES), num_beams=1, max_new_tokens=3, embedder="tuned"), {}
    module = InstructedModel(ranker.backbone, settings(), ranker)
    monkeypatch.setattr(module, "log_dict", logged.update)
    module.on_validation_epoch_start()
    module.validation_step(batch_of(ASKED) | {"target": torch.tensor([1, 2, 3, 4])}, 0)
    assert len(ranker.memory) == len(ASKED)
    assert ranker.vector
    module.on_validation_epoch_end()
    assert "val/NDCG@10" in logged
    assert [ranker.memory, ranker.vector, module.tables] == [{}, {}, None]


# ---- stages ----------------------------------------------------------------------------------------------------------

RECIPE = """\
# Titles said by a small language model.
defaults: [/base, /data: demo, /teacher: tiny-llama, /trainer: single, /logger: csv, _self_]
stages:
  prepare: {prepare: interactions}
  teacher:
    tune: bigrec
    base: ${teacher}
    history: 4
    samples: 96
    vocabulary: 400
    instruction: Go on.
    validation_users: 40
    generation: {num_beams: 2, max_new_tokens: 12, embedder: tuned}
    optimizer: {lr: 5.0e-3}
  users: {record: ranking, of: teacher, k: 9, per: user, batch_size: 50}
  targets: {record: ranking, of: teacher, k: 9}
  student: {fit: sasrec, model: {dim: 8, layers: 1}, callbacks: [{ranking_distillation: {from: users, k: 5}}]}
  popularity: {fit: popularity}
  evaluate: {evaluate: test, of: [teacher, student, popularity]}
"""
TARGETS = ["sequences.targets_per_user=1", "evaluation.users=30", "signals.shard_rows=40"]
WITH_LORA = "teacher.lora={rank: 4, alpha: 8, dropout: 0.1, targets: [q_proj, v_proj]}"
RESUMED = {
    "full": [],
    "lora": [WITH_LORA],
    "ranking": ["stages.teacher.validate=ranking"],
    "half": ["teacher.dtype=bfloat16", "trainer.precision=bf16-mixed"],
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Plan the recipe in one folder, so that what is done is done."""
    folder = tmp_path_factory.mktemp("titles")
    (folder / "titles.yaml").write_text(RECIPE)

    def planned(*overrides, place=folder):
        return small(place, *TARGETS, *overrides, recipe=str(folder / "titles.yaml"))

    return planned


@pytest.fixture(scope="module")
def done(stages):
    planned = stages()
    run(planned, None)
    return by_name(planned)


def test_the_teacher_is_ranked_beside_the_others(done):
    from lit_llmers.files import read_json

    models = {model["name"]: model for model in read_json(done["evaluate"].folder / "evaluation.json")["models"]}
    assert set(models) == {"teacher", "student", "popularity"}
    data, teacher = load_dataset(done["evaluate"]), load_model(done["teacher"], load_dataset(done["evaluate"]))
    rows = EvaluationRows(data, "test", done["teacher"].config.sequences.max_length, 30)
    ranks = np.load(done["evaluate"].folder / models["teacher"]["ranks"])
    table = teacher.embed(teacher.titles)
    for row in range(0, 30, 5):
        start, at = rows.start[row], rows.at[row]
        (text,) = teacher.say([data.items[start:at][-4:].tolist()])
        distance = (teacher.embed([tuple(teacher.wording.title(text))]) - table).norm(dim=1).numpy()
        met = set(data.items[data.offsets[rows.user[row]] : at].tolist()) - {int(rows.target[row])}
        distance[[item - 1 for item in met]] = np.inf
        own = distance[rows.target[row] - 1]
        ties = np.isclose(distance, own, rtol=1e-9, atol=1e-9)
        assert ranks[row] == ((distance < own) & ~ties).sum() + (ties.sum() - 1) / 2
    assert models["teacher"]["parameters"]["layers"] == 4
    assert models["teacher"]["inference"]["users_per_second"] > 0


@pytest.mark.parametrize("per", ["users", "targets"])
def test_a_record_holds_the_closest_items_that_were_not_met(done, per):
    data = load_dataset(done[per])
    rows = TrainingRows(data, done["teacher"].config.sequences)
    source, teacher = open_signals(done[per], rows), load_model(done["teacher"], data)
    table = teacher.embed(teacher.titles)
    for number in range(0, rows.targets, 20):
        user, at = (int(each[0]) for each in rows.places(np.array([number])))
        stop = at if per == "targets" else int(data.offsets[user] + (data.split[data.offsets[user] :][:60] == 0).argmin())
        asked = {"target_row": torch.tensor([number]), "user": torch.tensor([user]), "target": torch.tensor([1])}
        items, scores = source.read(asked)
        (text,) = teacher.say([data.items[data.offsets[user] : stop][-4:].tolist()])
        distance = (teacher.embed([tuple(teacher.wording.title(text))]) - table).norm(dim=1).numpy()
        met = set(data.items[data.offsets[user] : stop].tolist()) - ({int(data.items[at])} if per == "targets" else set())
        distance[[item - 1 for item in met]] = np.inf
        assert not met & set(items[0].tolist())
        np.testing.assert_allclose(-scores[0], np.sort(distance)[:9], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(-scores[0], distance[items[0] - 1], rtol=1e-4, atol=1e-4)
    assert done[per].summary["generated_titles"] > 20
    assert done[per].summary["tokens_per_second"] > 0


@pytest.mark.parametrize("constrained", [False, True])
def test_a_teacher_that_says_no_titles_is_warned_of(stages, done, caplog, constrained):
    """Two new tokens are no title, unless nothing else can be said."""
    asked = {False: "{num_beams: 1, max_new_tokens: 2}", True: "{num_beams: 1, max_new_tokens: 40, constrained: true}"}
    planned = stages(f"stages.teacher.generation={asked[constrained]}", "stages.users.k=7")
    run(planned, "users")
    said = by_name(planned)["users"].summary["said_is_a_title"]
    assert said == constrained
    warned = "teacher says a title of the catalogue after only 0 % of the histories"
    assert (warned in caplog.text) is not constrained
    if not constrained:
        caplog.clear()
        run(planned, "evaluate")
        assert warned in caplog.text, "of one that is evaluated too"


@pytest.mark.parametrize("cls", ["PreTrainedModel", "PreTrainedTokenizerBase"])
def test_a_disk_that_is_full_when_the_teacher_is_kept(stages, tmp_path, monkeypatch, cls):
    import transformers

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    planned = stages("trainer.max_epochs=1", place=tmp_path)
    run(planned, "prepare")
    monkeypatch.setattr(getattr(transformers, cls), "save_pretrained", full)
    with pytest.raises(UserError, match=r"No space left on the disk while writing .*teacher.* the same command again"):
        run(planned, "teacher")


def test_how_it_is_asked_makes_other_lists_and_no_other_teacher(stages, done):
    other = by_name(stages("stages.teacher.generation={num_beams: 1}"))
    assert other["teacher"].fingerprint == done["teacher"].fingerprint
    for name in ("users", "targets", "student", "evaluate"):
        assert other[name].fingerprint != done[name].fingerprint
    assert by_name(stages("stages.teacher.history=3"))["teacher"].fingerprint != done["teacher"].fingerprint


@pytest.mark.parametrize("tuned", ["full", "lora", "half"])
def test_peft_and_transformers_load_what_was_tuned(stages, done, tuned):
    """Without anything of ours: the same logits."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    planned, lora = stages(*RESUMED[tuned]), tuned == "lora"
    run(planned, "teacher")
    stage = by_name(planned)["teacher"]
    folder = stage.folder / tuning.MODEL
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "base" if lora else folder)
    plain = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    if lora:
        model = peft.PeftModel.from_pretrained(model, folder)
    ours = load_model(stage, load_dataset(by_name(planned)["users"]))
    tokens = torch.tensor([ours.wording.prompts([[1, 2, 3]])[0]])
    assert tokenizer(ours.wording.text([1, 2, 3]), add_special_tokens=False)["input_ids"] == tokens[0, 1:].tolist()
    torch.testing.assert_close(model.eval()(input_ids=tokens).logits, ours.backbone(input_ids=tokens).logits)
    assert model.dtype == ours.backbone.dtype == (torch.bfloat16 if tuned == "half" else torch.float32)
    if lora:
        assert (model(input_ids=torch.tensor([[5, 6, 7]])).logits - plain).abs().max() > 1e-3
        assert all("lora_" in name for name in weights(stage))
        assert stage.summary["parameters"]["trainable"] == sum(value.numel() for value in weights(stage).values())


@pytest.mark.parametrize("overrides", RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("batches", [2, 10])  # six batches are an epoch; a checkpoint comes every three
def test_killed_and_resumed_equals_uninterrupted(stages, tmp_path, monkeypatch, overrides, batches):
    whole = stages(*overrides)
    run(whole, "teacher")
    expected = by_name(whole)["teacher"]
    planned = stages(*overrides, place=tmp_path)
    stage = link(planned, by_name(whole), "teacher")
    make_trainer, killed = tuning.make_trainer, KillAfter(batches)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "make_trainer", lambda stage, callbacks: make_trainer(stage, [*callbacks, killed]))
        with pytest.raises(Killed):
            run(planned, "teacher")
    assert (stage.folder / "last.ckpt").exists() == (batches > 3)
    run(planned, "teacher")
    assert_equal_weights(weights(stage), weights(expected))
    assert stage.summary["best"] == expected.summary["best"]
    assert stage.summary["epochs"] == expected.summary["epochs"]


def test_a_record_that_failed_goes_on_to_the_same_bits(stages, done, tmp_path, monkeypatch):
    planned = stages(place=tmp_path)
    stage = link(planned, done, "users")
    generate, calls = GroundedRecommender.generate, []

    def fails_once(self, prompts):
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return generate(self, prompts)

    monkeypatch.setattr(GroundedRecommender, "generate", fails_once)
    with pytest.raises(Killed):
        run(planned, "users")
    kept = {path.name: path.stat().st_mtime_ns for path in stage.folder.rglob("shard-*.npy")}
    assert kept
    run(planned, "users")
    shards = sorted(path.relative_to(stage.folder) for path in stage.folder.rglob("shard-*.npy"))
    assert len(shards) == 8
    for shard in shards:
        ours, theirs = (np.load(place.folder / shard) for place in (stage, done["users"]))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_record_of_one_shard_goes_on_after_what_was_said(stages, done, tmp_path, monkeypatch):
    planned = stages("signals.shard_rows=null", place=tmp_path)
    stage = link(planned, done, "users")
    best_beams, said = GroundedRecommender._best_beams, []

    def fails_at_fourth(self, prompts):
        said.append(prompts)
        if len(said) == 4:
            raise Killed
        return best_beams(self, prompts)

    monkeypatch.setattr(GroundedRecommender, "_best_beams", fails_at_fourth)
    with pytest.raises(Killed):
        run([stage], None)
    run([stage], None)
    assert len(said) > 8
    assert [said.count(prompts) for prompts in said[:3] + said[4:]] == [1, 1, 1, 2] + [1] * (len(said) - 5)
    assert stage.summary["generated_titles"] == sum(map(len, said[:3] + said[4:]))
    ours, theirs = (
        np.concatenate([np.load(shard) for shard in sorted((place.folder / "ranking-scores").glob("shard-*.npy"))])
        for place in (stage, done["users"])
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("by", [0, 1], ids=["same", "other"])
def test_a_record_of_several_shards_says_nothing_twice(stages, tmp_path, monkeypatch, by):
    """Histories of one item, which shards have in common; and another process may go on than the one that was killed."""
    short = ["stages.teacher.history=1", "stages.teacher.generation={num_beams: 1, max_new_tokens: 3, embedder: tuned}"]
    before = stages(*short)
    run(before, "teacher")
    stage = link(stages(*short, place=tmp_path), by_name(before), "users")
    best_beams, said, second = GroundedRecommender._best_beams, [], []

    def fails_within_the_second_shard(self, prompts):
        if len(list(stage.folder.glob("ranking-items/shard-*.npy"))) == 1:
            second.append(prompts)
            if len(second) == 2:
                raise Killed
        said.append(prompts)
        return best_beams(self, prompts)

    monkeypatch.setattr(GroundedRecommender, "_best_beams", fails_within_the_second_shard)
    with pytest.raises(Killed):
        run([stage], None)
    (stage.folder / "said-0.jsonl").rename(stage.folder / f"said-{by}.jsonl")
    run([stage], None)
    assert len(said) > 8
    assert all(said.count(prompts) == 1 for prompts in said)
    assert stage.summary["generated_titles"] == sum(map(len, said))


def test_a_record_that_is_asked_to_stop_does_so_after_the_batch_at_hand(stages, done, tmp_path, monkeypatch):
    stage = link(stages("signals.shard_rows=null", place=tmp_path), done, "users")
    best_beams, said = GroundedRecommender._best_beams, []

    def asked_at_third(self, prompts):
        said.append(prompts)
        if len(said) == 3:
            monkeypatch.setattr(preemption, "_asked", signal.SIGUSR1)
        return best_beams(self, prompts)

    monkeypatch.setattr(GroundedRecommender, "_best_beams", asked_at_third)
    with pytest.raises(preemption.Stopped):
        run([stage], None)
    assert len(said) == len(read_journal(stage.folder / "said-0.jsonl")) == 3
    monkeypatch.setattr(preemption, "_asked", None)
    run([stage], None)
    assert all(said.count(prompts) == 1 for prompts in said)


@pytest.mark.parametrize("shards", [2, 4], ids=["some", "all"])
def test_a_record_that_was_stopped_counts_all_that_was_said(stages, done, tmp_path, monkeypatch, shards):
    stage = link(stages(place=tmp_path), done, "users")

    def stopped():
        if len(list(stage.folder.glob("ranking-items/shard-*.npy"))) == shards:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(record, "stop_if_asked", stopped)
        with pytest.raises(Killed):
            run([stage], None)
    run([stage], None)
    assert {*done["users"].summary} - {*stage.summary} == ({"rows_per_second"} if shards == 4 else set())
    for name in ("generated_titles", "said_is_a_title"):
        assert stage.summary[name] == done["users"].summary[name]
    seconds = stage.summary["generated_titles"] / stage.summary["titles_per_second"]
    assert seconds * stage.summary["prompt_tokens_per_second"] == pytest.approx(
        sum(entry["read"] for entry in read_journal(stage.folder / "said-0.jsonl"))
    )


def test_a_killed_evaluation_goes_on_after_what_was_said(stages, done, tmp_path, monkeypatch):
    stage = link(stages(place=tmp_path), done, "evaluate")
    best_beams, said = GroundedRecommender._best_beams, []

    def fails_at_second(self, prompts):
        said.append(len(prompts))
        if len(said) == 2:
            raise Killed
        return best_beams(self, prompts)

    monkeypatch.setattr(GroundedRecommender, "_best_beams", fails_at_second)
    with pytest.raises(Killed):
        run([stage], None)
    with np.load(stage.folder / "begun-teacher-seed0.npz") as earlier:
        assert earlier["seconds"] == 0, "what was said of a batch that is not ranked counts where it is kept, and once"
    run([stage], None)
    assert said == [16, 14, 14], "the first batch is said once"
    assert len(read_journal(stage.folder / "said-teacher-seed0.jsonl")) == 2
    for ranks in done["evaluate"].folder.glob("ranks-*.npy"):
        np.testing.assert_array_equal(np.load(stage.folder / ranks.name), np.load(ranks))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.teacher.tune=bigrex", "method of the tune stage.*'bigrex'.*'bigrec'"),
        ("stages.teacher.generation={beams: 3}", r"stages\.teacher\.generation\.beams"),
        ("stages.teacher.generation={embedder: bass}", "'bass'.*'base'"),
        ("stages.teacher.validate=los", "'los'.*'loss'"),
        ("stages.teacher.base={name: x, pth: y}", r"teacher\.pth.*'path'"),
        ("stages.teacher.samples=0", "samples of the tune stage is 0"),
        ("stages.users={record: block_states, of: teacher}", "'teacher', which is a tune stage"),
        ("stages.more={export: [onnx], of: teacher}", "'teacher', which is a tune stage"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(stages, override, message):
    with pytest.raises(UserError, match=message):
        stages(override)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ("max_new_tokens: 900", "max_new_tokens is 900, but"),
        ("max_new_tokens: 2, constrained: true", "max_new_tokens is 2, and"),
    ],
)
def test_how_it_is_asked_is_checked_before_it_is_tuned(stages, tmp_path, generation, message):
    planned = stages(f"stages.teacher.generation={{{generation}}}", place=tmp_path)
    with pytest.raises(UserError, match=message):
        run(planned, "teacher")
    assert not (by_name(planned)["teacher"].folder / "metrics.jsonl").exists()


def test_prompts_must_fit_the_base(stages):
    planned = stages("stages.teacher.max_tokens=2000")
    with pytest.raises(UserError, match="1024 positions, but max_tokens of stage 'teacher' is 2000"):
        run(planned, "teacher")
