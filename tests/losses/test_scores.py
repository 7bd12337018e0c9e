"""Scores of some items against the plain products, in value and gradient, on every path that computes them."""

import math

import pytest
import torch
from torch.nn import functional as F

from lit_llmers.losses import scores
from lit_llmers.losses.scores import list_scores, shared_scores


def inputs(rows: int = 7, n_items: int = 20, dim: int = 5, k: int = 4):
    generator = torch.Generator().manual_seed(0)
    user, table = (torch.randn(n, dim, dtype=torch.float64, generator=generator) for n in (rows, n_items + 1))
    return user.requires_grad_(), table.requires_grad_(), torch.randint(1, n_items + 1, (rows, k), generator=generator)


def test_scores_and_gradients_equal_the_plain_ones():
    user, table, items = inputs()
    items[2] = 3  # a repeat
    items[5, 2:] = 0
    cotangent = torch.randn(7, 4, dtype=torch.float64).masked_fill_(items == 0, 0)
    ours, plain = list_scores(user, table, items), torch.einsum("td,tkd->tk", user, table[items])
    torch.testing.assert_close(ours, plain)
    got, want = (torch.autograd.grad(of, [user, table], cotangent) for of in (ours, plain))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    assert (got[1][0] == 0).all(), "the padding row"


def test_lists_longer_than_the_catalogue():
    user, table, _ = inputs(n_items=2)
    items = torch.randint(0, 3, (7, 9))
    torch.testing.assert_close(list_scores(user, table, items), torch.einsum("td,tkd->tk", user, table[items]))


def test_what_a_cpu_computes_otherwise_is_the_same():
    user, table, items = inputs()
    items[2] = 3
    user, table, weight = user.detach(), table.detach(), torch.randn(items.shape, dtype=torch.float64)
    torch.testing.assert_close(scores._sampled_on_cpu(user, table, items), scores._sampled(user, table, items))
    ours, plain = (by(items, weight, len(table)) for by in (scores._by_item_on_cpu, scores._by_item))
    assert torch.equal(ours[0][ours[1][3] : ours[1][4]].sort().values, plain[0][plain[1][3] : plain[1][4]].sort().values)
    sums = [
        F.embedding_bag(row.long(), user, first.long(), per_sample_weights=w, mode="sum") for row, first, w in (ours, plain)
    ]
    torch.testing.assert_close(*sums)


def test_scores_where_only_one_side_learns_and_in_half_precision():
    user, table, items = inputs()
    only_user = torch.autograd.grad(list_scores(user, table.detach(), items).sum(), user)[0]
    both = torch.autograd.grad(list_scores(user, table, items).sum(), [user, table])
    torch.testing.assert_close(only_user, both[0])
    only_table = torch.autograd.grad(list_scores(user.detach(), table, items).sum(), table)[0]
    torch.testing.assert_close(only_table, both[1])
    half = user.detach().bfloat16().requires_grad_()
    listed = list_scores(half, table.detach().float(), items)
    assert listed.dtype == torch.float32
    assert torch.autograd.grad(listed.sum(), half)[0].dtype == torch.bfloat16


def test_compiled_is_eager():
    user, table, items = inputs()
    compiled = torch.compile(list_scores, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(of(user, table, items).square().sum(), [user, table]) for of in (compiled, list_scores))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_the_vectors_of_the_listed_items_are_not_kept():
    kept: list[int] = []
    user, table, items = inputs(rows=30, dim=8, k=20)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        list_scores(user, table, items)
    assert max(kept) == 30 * 20


def test_a_sparse_gradient_is_of_the_listed_rows_alone():
    user, table, items = inputs()
    sparse = torch.autograd.grad(list_scores(user, table, items, sparse=True).square().sum(), table)[0]
    assert sparse.is_sparse
    assert set(sparse.coalesce().indices()[0].tolist()) == set(items.flatten().tolist())
    dense = torch.autograd.grad(list_scores(user, table, items).square().sum(), table)[0]
    torch.testing.assert_close(sparse.to_dense(), dense)


@pytest.mark.parametrize("sparse", [False, True])
def test_scores_under_autocast_are_in_full_precision(sparse):
    user, table, items = inputs(dim=256)
    exact = list_scores(user, table, items)
    with torch.autocast("cpu", torch.bfloat16):
        listed = list_scores(user.float(), table.float(), items, sparse)
    torch.testing.assert_close(listed.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rows", "draws"), [(7, 2), (6, 3), (5, 1), (20, 2), (33, 3)])
def test_shared_scores_belong_to_the_row_of_each_target(rows, draws):
    user, table, _ = inputs(rows)
    items = torch.randint(1, 21, (draws, 3))
    of_target = items[torch.arange(rows) // math.ceil(rows / draws)]
    ours, plain = shared_scores(user, table, items), list_scores(user, table, of_target)
    torch.testing.assert_close(ours, plain)
    for got, want in zip(*(torch.autograd.grad(x.square().sum(), [user, table]) for x in (ours, plain)), strict=True):
        torch.testing.assert_close(got, want)
