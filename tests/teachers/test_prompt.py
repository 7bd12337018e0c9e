"""Instruction tokens, item vectors, response tokens."""

import pytest
import torch
from torch.nn import functional as F

from lit_llmers.backbones.llm_decoder import LLMDecoder
from lit_llmers.errors import UserError

ITEMS = torch.tensor([[0, 0, 3, 4, 5], [1, 2, 3, 4, 5], [0, 0, 0, 0, 9], [0, 0, 0, 0, 0]])


def build(path, max_length=20, **settings) -> LLMDecoder:
    torch.manual_seed(0)
    base = {"name": "tiny", "path": str(path), "prompt": "Tell the next item."} | settings
    return LLMDecoder(torch.randn(11, 8), max_length, base, layers=2).eval()


def test_the_sequence_is_instruction_items_response(folder):
    """Against the base itself, run on each row's own tokens and items without any padding or mask."""
    from transformers import AutoModel, AutoTokenizer

    model = build(folder)
    whole, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    before = "<s> ### Instruction:\nTell the next item.\n\n### Input:\n"
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, "\n\n### Response:\n")]
    assert tokens[0][0] == tokenizer.bos_token_id
    assert len(set(tokens[0])) > 3
    instruction, response = (whole.embed_tokens(torch.tensor(ids)) for ids in tokens)
    together = model(ITEMS, ITEMS > 0)
    for row, items in enumerate(ITEMS):
        vectors = model.input_proj(model.items[items[items > 0]])
        sequence = torch.cat([instruction, vectors, response])[None]
        expected = whole(inputs_embeds=sequence, output_hidden_states=True).hidden_states
        torch.testing.assert_close(together[1][row], expected[1][0, -1:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[2][row], whole.norm(expected[2])[0, -1:], rtol=1e-4, atol=1e-5)


def test_more_padding_changes_nothing(llama):
    model, wider = build(llama), F.pad(ITEMS, (6, 0))
    for left, right in zip(model(ITEMS, ITEMS > 0), model(wider, wider > 0), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_true_is_the_default_instruction_and_false_none(llama):
    default, other, none = build(llama, prompt=True), build(llama), build(llama, prompt=False)
    assert len(default.before) > len(other.before) > 0
    assert len(default.after) == len(other.after) > 0
    assert len(none.before) == len(none.after) == 0
    assert not {"before", "after"} & set(none.state_dict())


def test_every_position_needs_no_prompt(llama):
    with pytest.raises(UserError, match=r"examples=prefixes.*teacher\.prompt=false"):
        build(llama)(ITEMS, ITEMS > 0, every_position=True)
    assert build(llama, prompt=False)(ITEMS, ITEMS > 0, every_position=True)[-1].shape == (4, 5, 32)


def test_more_positions_than_the_base_has_are_refused(llama):
    with pytest.raises(UserError, match="2048 positions, but max_length=2040"):
        build(llama, max_length=2040)
