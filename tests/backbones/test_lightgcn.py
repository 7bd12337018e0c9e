import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lit_llmers.backbones.graph import Edges, propagate
from lit_llmers.backbones.lightgcn import LightGCN
from lit_llmers.backbones.rows import bag_sums, csr, half_squares, pair_dots
from lit_llmers.errors import UserError


@pytest.fixture
def double():
    """Build in float64, so that the graph's weights are exact too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_pairs(n_users: int = 9, n_items: int = 13, number: int = 60) -> np.ndarray:
    """Pairs of which some repeat; user 0 and item n have none."""
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(1, n_users, number), rng.integers(1, n_items, number)], 1)


def dense_graph(pairs: np.ndarray, n_users: int, n_items: int, keep: set | None = None) -> torch.Tensor:
    """The normalised adjacency by the book, node by node."""
    nodes = n_users + n_items + 1
    adjacency = torch.zeros(nodes, nodes)
    for user, item in {tuple(pair) for pair in pairs.tolist()}:
        if keep is None or (user, item) in keep:
            adjacency[user, n_users + item] = adjacency[n_users + item, user] = 1
    degree = adjacency.sum(1)
    scale = torch.where(degree > 0, degree.clamp(min=1) ** -0.5, 0.0)
    return scale[:, None] * adjacency * scale


def test_official_numbers(golden, double):
    """gusye1234/LightGCN-PyTorch: tables, loss with its L2 term, and the gradient of both."""
    z = golden("backbone_lightgcn/case_a")
    n_users, n_items = z["in.interactions"].shape
    user, item = z["in.interactions"].nonzero(as_tuple=True)
    pairs = torch.stack([user, item + 1], 1).numpy()
    model = LightGCN(n_users, n_items, pairs, dim=8, layers=int(z["hp.layers"]), reg=float(z["hp.reg_weight"]))
    with torch.no_grad():
        model.nodes[:n_users] = z["param.embedding_user.weight"]
        model.nodes[n_users + 1 :] = z["param.embedding_item.weight"]
    users, items = model()
    torch.testing.assert_close(users, z["out.user_embeddings"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(items[1:], z["out.item_embeddings"], rtol=1e-9, atol=1e-10)

    batch = {"user": z["in.users"], "target": z["in.items_pos"] + 1, "negatives": z["in.items_neg"][:, None] + 1}
    positive, negative = model.pair_scores(batch, users, items)
    total = F.softplus(negative[:, 0] - positive).mean() + model.penalty(batch)
    torch.testing.assert_close(total, z["out.total"], rtol=1e-9, atol=1e-10)
    total.backward()
    assert model.nodes.grad is not None
    torch.testing.assert_close(model.nodes.grad[:n_users], z["grad.param.embedding_user.weight"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(model.nodes.grad[n_users + 1 :], z["grad.param.embedding_item.weight"], rtol=1e-7, atol=1e-9)
    assert not model.nodes.grad[n_users].any()


@pytest.mark.parametrize("with_input", [True, False])
def test_propagation_equals_the_dense_product(double, with_input):
    """Mean and every layer, each layer on a graph of its own, and the gradient through all of them."""
    pairs, layers = random_pairs(), 3
    edges = Edges.of(pairs, 9, 13)
    keeps = [np.random.default_rng(layer).random(len(edges.user)) < 0.7 for layer in range(layers)]
    dense = [
        dense_graph(pairs, 9, 13, set(zip(edges.user[keep].tolist(), edges.item[keep].tolist(), strict=True))) for keep in keeps
    ]
    table = torch.randn(23, 5, requires_grad=True)
    mean, hops = propagate(table, [edges.graph(keep) for keep in keeps], with_input)
    expected = [table]
    for matrix in dense:
        expected.append(matrix @ expected[-1])
    read = expected if with_input else expected[1:]
    upstream = torch.randn(layers + 1, 23, 5)

    def total(mean, hops):
        return (mean * upstream[0]).sum() + sum((hop * up).sum() for hop, up in zip(hops, upstream[1:], strict=True))

    torch.testing.assert_close(mean, torch.stack(read).mean(0))
    for hop, other in zip(hops, expected[1:], strict=True):
        torch.testing.assert_close(hop, other)
    for parts in ((mean, hops), (mean, ()), (torch.zeros(()), hops)):  # both, and one without the other
        theirs = (torch.stack(read).mean(0) if parts[0] is mean else torch.zeros(()), expected[1:] if parts[1] else ())
        ours = torch.autograd.grad(total(parts[0], parts[1] or [torch.zeros(())] * layers), table, retain_graph=True)
        plain = torch.autograd.grad(total(theirs[0], theirs[1] or [torch.zeros(())] * layers), table, retain_graph=True)
        torch.testing.assert_close(ours, plain)


def test_a_repeated_pair_is_one_edge():
    pairs = random_pairs()
    once, twice = (Edges.of(each, 9, 13).graph() for each in (pairs, np.concatenate([pairs, pairs])))
    assert all(torch.equal(a, b) for a, b in zip(once.buffers(), twice.buffers(), strict=True))


def test_both_kernels_give_the_same():
    """The CSR product is what an accelerator runs."""
    graph, table = Edges.of(random_pairs(), 9, 13).graph(), torch.randn(23, 5)
    expected = csr(graph.offsets, graph.columns, graph.weights, 23) @ table
    torch.testing.assert_close(bag_sums(graph.offsets, graph.columns, graph.weights, table), expected)


@pytest.mark.parametrize("pairs", [20, 40])  # fewer and more scores than the 77 cells there are
@pytest.mark.parametrize("order", ["ascending", "random"])
def test_pair_dots_equal_the_plain_ones_with_their_gradients(double, order, pairs):
    users, items = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    user, item = torch.randint(0, 6, (pairs,)), torch.randint(0, 11, (pairs, 3))  # they repeat; user 6 does not occur
    user = user.sort().values if order == "ascending" else user
    dots, plain = pair_dots(users, items, user, item), (users[user][:, None] * items[item]).sum(2)
    torch.testing.assert_close(dots, plain)
    upstream = torch.randn(pairs, 3)
    ours, theirs = (torch.autograd.grad((each * upstream).sum(), (users, items)) for each in (dots, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairs", [20, 40])
def test_pair_dots_are_in_full_precision_under_autocast(given, pairs):
    users, items = (torch.randn(rows, 5).to(given).requires_grad_() for rows in (7, 11))
    user, item = torch.randint(0, 7, (pairs,)), torch.randint(0, 11, (pairs, 3))
    with torch.autocast("cpu", torch.bfloat16):
        dots = pair_dots(users, items, user, item)
    assert dots.dtype == torch.float32
    torch.testing.assert_close(dots, (users.float()[user][:, None] * items.float()[item]).sum(2))
    assert all(gradient.dtype == given for gradient in torch.autograd.grad(dots.sum(), (users, items)))


def test_half_squares_and_their_gradient(double):
    assert torch.autograd.gradcheck(half_squares, (torch.randn(6, 3, requires_grad=True), torch.rand(6)))
    table, rows = torch.randn(6, 3), torch.tensor([0, 0, 4])
    torch.testing.assert_close(half_squares(table, torch.bincount(rows, minlength=6)), table[rows].square().sum() / 2)


@pytest.mark.parametrize(("layers", "with_input", "least"), [(-1, True, 0), (0, False, 1)])
def test_too_few_layers_are_named(layers, with_input, least):
    with pytest.raises(UserError, match=f"model.layers is {layers}. It must be at least {least}"):
        LightGCN(9, 13, random_pairs(), layers=layers, with_input=with_input)


def test_no_layer_is_matrix_factorisation():
    model = LightGCN(9, 13, random_pairs(), dim=4, layers=0)
    assert torch.equal(torch.cat(model()), model.nodes)
