"""What every backbone owes the rest: see lit_llmers/backbones/__init__.py."""

import pytest
import torch
from torch import nn

from lit_llmers.backbones.gru4rec import GRU4Rec
from lit_llmers.backbones.llm_decoder import LLMDecoder
from lit_llmers.backbones.sasrec import SASRec

N_ITEMS, MAX_LENGTH = 40, 12
SIZES = {"vocab_size": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}


def sasrec() -> nn.Module:
    return SASRec(N_ITEMS, MAX_LENGTH, dim=16, layers=3, init_std=0.5)


def gru4rec() -> nn.Module:
    return GRU4Rec(N_ITEMS, MAX_LENGTH, dim=16, layers=2, init_std=1.0)


def llama() -> nn.Module:
    return decoder({"model_type": "llama", "num_key_value_heads": 2})


def qwen3() -> nn.Module:
    return decoder({"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8})


def decoder(config: dict) -> nn.Module:
    base = {"name": "tiny", "config": SIZES | config | {"initializer_range": 0.2}}
    return LLMDecoder(torch.randn(N_ITEMS + 1, 16), MAX_LENGTH, base, layers=3, train_items=True)


BACKBONES = [sasrec, gru4rec, llama, qwen3]


@pytest.fixture(params=BACKBONES, ids=lambda make: make.__name__)
def backbone(request) -> nn.Module:
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture
def items() -> torch.Tensor:
    """Five histories of 8, 5, 1, 0 and 8 items."""
    items = torch.randint(1, N_ITEMS + 1, (5, 8), generator=torch.Generator().manual_seed(1))
    items[1, :3], items[2, :7], items[3] = 0, 0, 0
    return items


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_shapes(backbone, items):
    every = backbone(items, items > 0, every_position=True)
    assert [state.shape for state in every] == [(5, 8, backbone.width)] * (backbone.layers + 1)
    assert backbone.head(every[-1]).shape == (5, 8, backbone.dim)
    assert backbone.item_table().shape == (N_ITEMS + 1, backbone.dim)
    assert not backbone.item_table()[0].any()


def test_the_read_out_position_is_the_last_one(backbone, items):
    every, last = backbone(items, items > 0, every_position=True), backbone(items, items > 0)
    assert_same(last, [state[:, -1:] for state in every])


def test_the_future_has_no_influence_and_the_past_has(backbone, items):
    full = items[[0, 4]]
    changed = full.clone()
    changed[:, 5] = changed[:, 5] % N_ITEMS + 1
    before, after = (backbone(rows, rows > 0, every_position=True) for rows in (full, changed))
    assert_same([state[:, :5] for state in before], [state[:, :5] for state in after])
    assert (before[-1][:, 5:] - after[-1][:, 5:]).abs().amax(-1).min() > 1e-3


def test_padding_has_no_influence(backbone, items):
    together = backbone(items, items > 0, every_position=True)
    for row, length in ((0, 8), (1, 5), (2, 1)):
        alone = items[row : row + 1, -length:]
        assert_same([state[row : row + 1, -length:] for state in together], backbone(alone, alone > 0, every_position=True))


def test_more_padding_changes_nothing(backbone, items):
    items = items[:3]
    wider = nn.functional.pad(items, (4, 0))
    assert_same(backbone(items, items > 0), backbone(wider, wider > 0))


def test_a_row_of_padding_alone_makes_no_nan(backbone, items):
    backbone.train()
    states = backbone(items, items > 0, every_position=True)
    assert all(torch.isfinite(state).all() for state in states)
    backbone.head(states[-1]).square().mean().backward()
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in trained)


def test_bfloat16_is_close_to_float32(backbone, items):
    exact = backbone.head(backbone(items, items > 0)[-1])
    rough = backbone.bfloat16().head(backbone(items, items > 0)[-1])
    assert rough.dtype == torch.bfloat16
    assert torch.isfinite(rough).all()
    cosine = torch.cosine_similarity(rough.float(), exact, dim=-1)
    assert cosine[[0, 1, 2, 4]].min() > 0.99


@pytest.mark.parametrize("make", BACKBONES, ids=lambda make: make.__name__)
def test_state_dict_round_trip(make, items):
    torch.manual_seed(0)
    source = make().eval()
    torch.manual_seed(1)
    copy = make().eval()
    with pytest.raises(AssertionError):
        assert_same(source(items, items > 0), copy(items, items > 0))
    copy.load_state_dict(source.state_dict())
    assert_same(source(items, items > 0), copy(items, items > 0), tolerance=0)


def test_the_padding_row_stays_zero_in_training(backbone, items):
    adam = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    before = backbone.item_table().detach().clone()
    for _ in range(2):
        adam.zero_grad()
        user = backbone.head(backbone(items, items > 0)[-1][:, 0])
        nn.functional.cross_entropy(user @ backbone.item_table()[1:].T, items[:, 0]).backward()
        adam.step()
    assert (backbone.item_table() - before)[1:].abs().amax(1).min() > 0
    assert not backbone.item_table()[0].any()


@pytest.mark.parametrize("make", [gru4rec, llama, qwen3], ids=lambda make: make.__name__)
def test_every_position_says_what_its_prefix_says(make, items):
    """SASRec is left out: its positions are counted from the end, so a prefix is not where it was in the whole row."""
    backbone = make().eval()
    row = items[:1]
    every = backbone(row, row > 0, every_position=True)
    for length in range(1, 9):
        prefix = row[:, :length]
        assert_same([state[:, length - 1 : length] for state in every], backbone(prefix, prefix > 0))
