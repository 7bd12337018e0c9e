"""AlphaRec against its definition in dense matrices and plain loops, and what it makes of texts that are missing."""

import math

import numpy as np
import pytest
import torch
from tiny import random_dataset

from lit_llmers.backbones.alpharec import AlphaRec
from lit_llmers.data.pairs import PairBatches, PairRows
from lit_llmers.errors import UserError
from lit_llmers.losses.sampled import own_softmax

U, N, D = 20, 30, 6


@pytest.fixture(scope="module")
def data():
    return random_dataset(users=U, n_items=N)


def texts(empty: int | None = 4) -> torch.Tensor:
    table = torch.randn(N + 1, D, generator=torch.Generator().manual_seed(5))
    table[[0] if empty is None else [0, empty]] = 0
    return table


def build(data, table: torch.Tensor, **settings) -> AlphaRec:
    torch.manual_seed(0)
    return AlphaRec(U, N, table, data.training_pairs, dim=4, **settings).double()


@pytest.mark.parametrize("hidden", [None, 0.5, 3.0])
def test_scores_are_cosines_of_propagated_means_over_the_temperature(data, hidden):
    table, pairs = texts(), data.training_pairs
    backbone = build(data, table, hidden=hidden, temperature=0.2)
    met = np.zeros((U, N + 1))
    met[pairs[:, 0], pairs[:, 1]] = 1
    z = table.double().numpy()
    own = [z[(row > 0) & z.any(1)] for row in met]
    z = np.concatenate([[rows.mean(0) for rows in own], z])
    weights = [parameter.detach().numpy() for parameter in backbone.mlp.parameters()]
    if hidden is None:
        x = z @ weights[0].T
    else:
        assert weights[0].shape == (int(hidden * D), D)
        inner = z @ weights[0].T + weights[1]
        x = np.where(inner > 0, inner, 0.01 * inner) @ weights[2].T + weights[3]
    adjacency = np.block([[np.zeros((U, U)), met], [met.T, np.zeros((N + 1, N + 1))]])
    scale = np.maximum(adjacency.sum(1), 1) ** -0.5
    step = adjacency * scale[:, None] * scale
    final = (x + step @ x + step @ step @ x) / 3
    users, items = (each.detach().numpy() for each in backbone())
    for user in range(U):
        for item in range(1, N + 1):
            a, b = final[user], final[U + item]
            cosine = a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)) if b.any() else 0.0
            assert users[user] @ items[item] == pytest.approx(cosine / 0.2, abs=1e-6)  # the graph's weights are float32
    assert not items[0].any()


def test_a_step_is_the_sampled_softmax_of_the_official_code(data):
    """-log(e^(cos/tau) / (e^(cos/tau) + sum e^(cos/tau))) of rows that are picked and normalised one by one."""
    backbone = build(data, texts())
    users, items = backbone()
    batch = next(iter(PairBatches(PairRows(data), 16, 8, seed=0)))
    ours = own_softmax(*backbone.pair_scores(batch, users, items))
    for row, (user, target) in enumerate(zip(batch["user"].tolist(), batch["target"].tolist(), strict=True)):
        candidates = items[[target, *batch["negatives"][row].tolist()]]
        cosine = torch.cosine_similarity(users[user], candidates)
        expected = -torch.log((cosine / 0.15).exp()[0] / (cosine / 0.15).exp().sum())
        torch.testing.assert_close(ours[row], expected)


def test_only_the_map_is_trained_and_saved(data):
    backbone = build(data, texts(), hidden=2.0)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == D * 12 + 12 + 12 * 4 + 4
    assert backbone.serving_size() == sum(table.numel() for table in backbone()), "two tables serve, without text or network"
    assert set(backbone.state_dict()) == {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}


def test_items_with_equal_texts_and_no_neighbours_are_equal(data):
    """What the training never met is known by its text."""
    pairs = data.training_pairs
    pairs = pairs[~np.isin(pairs[:, 1], (7, 8))]
    table = texts()
    table[8] = table[7]
    items = AlphaRec(U, N, table, pairs, dim=4)()[1]
    assert items[7].any()
    assert torch.equal(items[7], items[8])


def test_what_cannot_be_is_refused(data):
    with pytest.raises(UserError, match="No item has a text vector"):
        build(data, torch.zeros(N + 1, D))
    with pytest.raises(UserError, match="model.hidden is 0.1 of a text vector's 6 columns"):
        build(data, texts(), hidden=0.1)
