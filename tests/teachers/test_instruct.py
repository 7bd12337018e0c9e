"""Prompts and responses, their loss, and what is trained."""

import re

import numpy as np
import pytest
import torch
from titles import BASE, LORA, TITLES, language_model, settings, titled, wording_of

from lit_llmers.conf.instruction import GenerationConfig
from lit_llmers.conf.schema import SequenceConfig
from lit_llmers.data.loader import TrainingBatches
from lit_llmers.errors import UserError
from lit_llmers.teachers.grounding import GroundedRecommender
from lit_llmers.teachers.instruct import InstructedModel
from lit_llmers.teachers.instructions import IGNORED, HeldOutBatches, InstructionBatches, InstructionRows
from lit_llmers.teachers.language_model import read
from lit_llmers.teachers.wording import pad_left, title_tokenizer

HISTORIES = [[1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13, 14, 15], [2, 4, 6]]


def rows_of(data, wording, samples=None, seed=0) -> InstructionRows:
    return InstructionRows.of_training(data, wording, settings().sequences, samples, seed)


# ---- words -----------------------------------------------------------------------------------------------------------


def test_every_training_item_but_a_users_first_is_a_response_after_those_before_it():
    data = titled(HISTORIES)
    wording = wording_of(data, history=2)
    rows = rows_of(data, wording)
    examples = [rows.example(row) for row in range(len(rows))]
    assert sorted(examples) == sorted([([1], 2), ([1, 2], 3), ([6], 7), ([10], 11), ([10, 11], 12), ([11, 12], 13)])
    text = wording.text([10, 11])
    assert f"\n{TITLES[9]}\n{TITLES[10]}\n" in text
    assert wording.tokenizer.decode(wording.prompts([[10, 11]])[0]) == "<s>" + text
    assert wording.tokenizer.decode(wording.response(12)) == TITLES[11] + "</s>"


def test_a_prompt_tells_of_no_more_items_than_those_who_ask_have():
    data = titled(HISTORIES)
    short, long = (wording_of(data, history=4, sequences=SequenceConfig(length)) for length in (2, 50))
    last = [rows_of(data, wording).example(-1) for wording in (short, long)]
    assert last == [([11, 12], 13), ([10, 11, 12], 13)]
    assert short.prompts([[10, 11, 12]]) == short.prompts([[11, 12]])


def test_a_sample_is_a_part_of_the_targets_and_belongs_to_its_seed():
    data = titled(HISTORIES)
    wording = wording_of(data)
    every = set(rows_of(data, wording).at)
    drawn = [tuple(rows_of(data, wording, 3, seed).at) for seed in (0, 0, 1, 2, 3)]
    assert all(len(set(sample)) == 3 and set(sample) <= every for sample in drawn)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_without_a_titled_validation_item_nothing_can_be_selected():
    data = titled([[1, 2, 16, 3], [4, 5, 6, 16, 7]], [*TITLES, ""])
    with pytest.raises(UserError, match="No validation item has a title"):
        InstructionRows.of_validation(data, wording_of(data), None)


def test_what_comes_after_nothing_that_a_prompt_could_tell_of_is_not_trained_on_and_that_is_said(caplog):
    data = titled([[16, 1, 2, 3, 4], [16, 5, 16, 6, 7, 8], *HISTORIES[2:]], [*TITLES, ""])
    rows = rows_of(data, wording_of(data))
    targets = {int(data.items[at]) for user, at in zip(rows.user, rows.at, strict=True) if user < 2}
    assert targets == {2, 6}, "not the 1 and the 5 after the untitled 16"
    assert "2 of 8 training targets come after items of which no text says anything, and are left out" in caplog.text
    caplog.clear()
    rows_of(titled(HISTORIES), wording_of(titled(HISTORIES)))
    assert not caplog.text
    empty = titled([[16, 1, 2, 3]], [*TITLES, ""])
    with pytest.raises(UserError, match="comes after an item with a text, so there is nothing to tune on"):
        rows_of(empty, wording_of(empty))


def test_held_out_items_are_in_no_training_prompt_and_no_response():
    """User 0's validation item and user 1's test item have titles that stand nowhere else."""
    marked = [*TITLES, "Zanzibar quux", "Quixotic zephyr"]
    data = titled([[1, 2, 3, 16, 5], [6, 7, 8, 9, 17], *HISTORIES[2:]], marked)
    wording = wording_of(data)
    rows = rows_of(data, wording)
    said = []
    for on_prompt in (False, True):
        for batch in InstructionBatches(rows, on_prompt, 2, 0):
            said += wording.tokenizer.batch_decode(batch["tokens"])
            said += wording.tokenizer.batch_decode(batch["labels"].clamp(min=0))
    assert TITLES[1] in " ".join(said)
    assert not [text for text in said if "Zanzibar" in text or "Quixotic" in text]
    held_out = InstructionRows.of_validation(data, wording, None)
    validated = [wording.tokenizer.decode(ids) for batch in HeldOutBatches(held_out, 2) for ids in batch["tokens"]]
    assert len(validated) == 4
    assert [text for text in validated if text.endswith("Zanzibar quux</s>")]
    assert not [text for text in validated if "Quixotic" in text], "the test item"


def test_a_prompt_that_is_too_long_loses_its_oldest_items():
    data = titled(HISTORIES)
    whole = wording_of(data)
    size = len(whole.prompts([[10, 11, 12, 13]])[0])
    for max_tokens in range(size + whole.room, size + whole.room - 12, -2):
        wording = wording_of(data, max_tokens=max_tokens)
        prompt = wording.prompts([[10, 11, 12, 13], [1]])[0]
        assert len(prompt) + wording.room <= max_tokens
        text = wording.tokenizer.decode(prompt)
        told = [item for item in (10, 11, 12, 13) if f"{TITLES[item - 1]}\n" in text]
        assert text == "<s>" + wording.text(told)
        assert told == [10, 11, 12, 13][-len(told) :]
    assert len(told) < 4


def test_a_prompt_has_room_for_an_item_or_is_refused():
    """With less than that all prompts would be the same."""
    data = titled(HISTORIES)
    with pytest.raises(UserError, match=r"max_tokens of the tune stage is 1, .* no room for any item in a prompt") as refused:
        wording_of(data, max_tokens=1)
    least = int(re.search(r"Choose (\d+)", str(refused.value))[1])
    with pytest.raises(UserError, match=f"max_tokens of the tune stage is {least - 1}, .* Choose {least}"):
        wording_of(data, max_tokens=least - 1)
    wording = wording_of(data, max_tokens=least)
    some, other, alike = wording.prompts([[1], [2], [11, 12, 1]])
    assert len(some) + wording.room <= least
    assert some == alike != other


def test_without_a_field_no_prompt_tells_of_anything():
    with pytest.raises(UserError, match="fields of the tune stage is empty"):
        wording_of(titled(HISTORIES), fields=[])


def test_what_was_said_keeps_its_spaces():
    titles = ["Don 't Panic !", "Salt , Pepper", "Yes , we 're here ."]
    data = titled([[1, 2, 3, 1, 2]], titles)
    wording = wording_of(data)
    wording.tokenizer.clean_up_tokenization_spaces = True
    wording.tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    assert [wording.said(wording.response(item)) for item in (1, 2, 3)] == titles


def test_items_without_title_are_left_out_and_titles_are_text_whatever_they_look_like(caplog):
    data = titled([[1, 2, 3, 4, 5]] * 2, ["A", "", "</s><pad>", "D", "E"])
    wording = wording_of(data)
    assert [rows.example(row) for rows in [rows_of(data, wording)] for row in range(len(rows))] == [([1, 2], 3)] * 2
    assert "2 of 4 training targets have no title to be said, and are left out" in caplog.text
    assert wording.text([1, 2]) == wording.text([1])
    assert wording.response(3)[-1] == wording.end
    assert wording.end not in wording.response(3)[:-1]
    with pytest.raises(UserError, match=r"No item has a title.*data\.columns\.title"):
        wording_of(titled([[1, 2, 3]], ["", "", ""]))


def test_the_fields_tell_of_items():
    data = titled(HISTORIES)
    data.catalogue["categories"] = "drama"
    wording = wording_of(data, fields=["title", "categories"], instruction="Say {it}.")
    assert f"{TITLES[0]}. drama\n{TITLES[1]}. drama" in wording.text([1, 2])
    assert "Say {it}." in wording.text([1, 2])
    assert wording.tokenizer.decode(wording.response(1)) == TITLES[0] + "</s>"


def test_the_tokenizer_of_the_titles_knows_every_text_and_is_always_the_same():
    data = titled(HISTORIES)
    first, second = (title_tokenizer(data, ["title"], 320) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    for text in (*TITLES, "Amélie “8½” 東京物語 🎬", "  spaces  "):
        assert first.decode(first(text, add_special_tokens=False)["input_ids"]) == text
    assert len(first("Red River", add_special_tokens=False)["input_ids"]) <= 2
    asked = title_tokenizer(data, ["title"], 320, "Zyx zyx zyx zyx")
    assert len(asked("zyx", add_special_tokens=False)["input_ids"]) < len(first("zyx", add_special_tokens=False)["input_ids"])


# ---- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_prompt", [False, True])
def test_the_loss_is_that_of_each_row_alone(on_prompt):
    """Against Hugging Face's own loss of one unpadded row, whose labels are the response, or all of it."""
    data = titled(HISTORIES)
    wording = wording_of(data)
    rows, model = rows_of(data, wording), language_model(wording)
    module = InstructedModel(model, settings())
    (batch,) = InstructionBatches(rows, on_prompt, len(rows), 0)
    assert not batch["mask"].all(), "rows of different lengths"
    total, count = 0.0, 0
    for row in batch["row"].tolist():
        history, target = rows.example(row)
        prompt, response = wording.prompts([history])[0], wording.response(target)
        tokens = torch.tensor([[*prompt, *response]])
        labels = tokens if on_prompt else torch.tensor([[*[IGNORED] * len(prompt), *response]])
        number = int((labels[:, 1:] != IGNORED).sum())
        total += model(input_ids=tokens, labels=labels).loss.item() * number
        count += number
    losses = module.token_losses(batch)
    assert len(losses) == count
    assert losses.mean().item() == pytest.approx(total / count, rel=1e-5)


def test_states_of_a_batch_of_mixed_lengths_are_those_of_one_at_a_time():
    wording = wording_of(titled(HISTORIES))
    model = language_model(wording)
    prompts = wording.prompts([[1], [2, 3, 4], [5, 6, 7, 8, 9]])
    together = read(model, *pad_left(prompts, wording.end)).logits[:, -1]
    for row, tokens in enumerate(prompts):
        torch.testing.assert_close(model(input_ids=torch.tensor([tokens])).logits[0, -1], together[row], rtol=1e-4, atol=1e-5)


# ---- training --------------------------------------------------------------------------------------------------------


def train(module: InstructedModel, batches: TrainingBatches, epochs: int, lr: float) -> None:
    adam = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    module.train()
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            adam.zero_grad()
            module.token_losses(batch).mean().backward()
            adam.step()
    module.eval()


EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("lora", [None, LORA | {"rank": 16, "alpha": 32, "targets": EVERYWHERE}], ids=["full", "lora"])
def test_ten_users_are_learnt_by_heart(lora):
    """What is said after each history is the very title that came next, and grounding puts that item first."""
    rng = np.random.default_rng(0)
    histories = [rng.permutation(15)[:5] + 1 for _ in range(10)]
    data = titled([[*history.tolist(), 1, 1] for history in histories])
    wording = wording_of(data)
    rows = InstructionRows(data, wording, np.arange(10), data.offsets[:-1] + 4)
    model = language_model(wording, lora, config=settings().base["config"] | {"initializer_range": 0.4 if lora else 0.1})
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    module = InstructedModel(model, settings())
    train(module, InstructionBatches(rows, False, 5, 0), epochs=80 if lora else 60, lr=5e-3)
    assert bool(frozen) == bool(lora)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)

    ranker = GroundedRecommender(model, wording, GenerationConfig(num_beams=2, embedder="tuned"))
    expected = [int(history[4]) for history in histories]
    said = ranker.say([history[:4].tolist() for history in histories])
    assert said == [TITLES[item - 1] for item in expected]
    batch = {"items": torch.tensor(np.stack([history[:4] for history in histories]))}
    items, scores = ranker.top_items(batch, 3)
    assert items[:, 0].tolist() == expected
    assert scores[:, 0].abs().max() < 1e-4
    assert (scores[:, 1] < -0.1).all()


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_holds_what_trains_and_no_frozen_head(tied):
    wording = wording_of(titled(HISTORIES))
    module = InstructedModel(language_model(wording, LORA, config=BASE["config"] | {"tie_word_embeddings": tied}), settings())
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == {name for name, p in module.named_parameters() if p.requires_grad}
    module.on_load_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == set(module.state_dict())
