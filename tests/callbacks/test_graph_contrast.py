"""SGL against the official numbers, SimGCL against its definition, and what the views of an epoch are."""

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from scipy.stats import kstest
from tiny import random_dataset
from torch.nn import functional as F

from lit_llmers.backbones.graph import Graph
from lit_llmers.backbones.lightgcn import LightGCN
from lit_llmers.backbones.rows import csr
from lit_llmers.callbacks.graph_contrast import GraphContrast, GraphContrastTerm, GraphParts, Noise, uniform_like
from lit_llmers.data.pairs import PairDataModule
from lit_llmers.errors import UserError
from lit_llmers.students.collaborative import CollaborativeRecommender, TableOutput

PAIRS = np.stack([np.random.default_rng(0).integers(0, 40, 300), np.random.default_rng(1).integers(1, 31, 300)], 1)


@pytest.fixture
def double():
    """Build in float64, so that the graph's weights are exact too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def lightgcn(layers: int = 3, with_input: bool = True) -> LightGCN:
    torch.manual_seed(0)
    return LightGCN(40, 30, PAIRS, dim=8, layers=layers, with_input=with_input, init_std=1.0)


def some_batch(rows: int = 50) -> dict[str, torch.Tensor]:
    return {"user": torch.randint(0, 40, (rows,)), "target": torch.randint(1, 31, (rows,))}


def output_of(model: LightGCN, batch: dict[str, torch.Tensor]) -> TableOutput:
    users, items = model()
    return TableOutput(users, items, batch["user"])


def in_csr_form(dense: torch.Tensor, n_users: int) -> Graph:
    """A graph of users and items without the padding node, which is put in."""
    nodes = torch.cat([torch.arange(n_users), torch.arange(n_users + 1, len(dense) + 1)])
    whole = torch.zeros(len(dense) + 1, len(dense) + 1)
    whole[nodes[:, None], nodes] = dense
    sparse = whole.to_sparse_csr()
    return Graph(sparse.crow_indices().int(), sparse.col_indices().int(), sparse.values())


def test_official_numbers(golden, double):
    """wujcan/SGL-Torch, whose losses are sums over the batch: ours are means."""
    z = golden("backbone_sgl/case_a")
    n_users, batch_size = len(z["param.user_embeddings.weight"]), len(z["in.users"])
    n_items, layers = len(z["param.item_embeddings.weight"]), int(z["hp.layers"])
    model = LightGCN(n_users, n_items, np.array([[0, 1]]), dim=8, layers=layers, reg=float(z["hp.reg"]))
    model.graph = in_csr_form(z["in.graph"], n_users)
    with torch.no_grad():
        model.nodes[:n_users] = z["param.user_embeddings.weight"]
        model.nodes[n_users + 1 :] = z["param.item_embeddings.weight"]
    views = GraphParts(model, "random_walk", 0.1, seed=0)
    views.graphs = [[in_csr_form(part, n_users) for part in z[key]] for key in ("in.sub_graph1", "in.sub_graph2")]
    term = GraphContrastTerm(views, every_node=True, temperature=float(z["hp.ssl_temp"]))

    batch = {"user": z["in.users"], "target": z["in.items_pos"] + 1, "negatives": z["in.items_neg"][:, None] + 1}
    output = output_of(model, batch)
    contrast = term(output, batch)
    torch.testing.assert_close(contrast * batch_size, z["out.infonce"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(term.parts["user"] + term.parts["item"], contrast.detach())
    positive, negative = model.pair_scores(batch, output.users, output.items)
    bpr = F.softplus(negative[:, 0] - positive).mean()
    total = bpr + model.penalty(batch) + z["hp.ssl_reg"] * contrast
    torch.testing.assert_close(total * batch_size, z["out.total"], rtol=1e-9, atol=1e-10)
    (total * batch_size).backward()
    gradient = model.nodes.grad
    assert gradient is not None
    torch.testing.assert_close(gradient[:n_users], z["grad.param.user_embeddings.weight"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient[n_users + 1 :], z["grad.param.item_embeddings.weight"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["edge_dropout", "node_dropout", "random_walk"])
def test_what_a_view_keeps(kind):
    model = lightgcn()
    views = GraphParts(model, kind, 0.3, seed=7)
    views.redraw(0)
    whole = {tuple(pair) for pair in PAIRS.tolist()}
    drawn = [[edges_of(graph) for graph in graphs] for graphs in views.graphs]
    assert [len(graphs) for graphs in drawn] == [3, 3]
    for edges in drawn:
        assert all(layer < whole for layer in edges)
        assert (edges[0] == edges[1] == edges[2]) == (kind != "random_walk")
    assert drawn[0][0] != drawn[1][0], "the two views differ"
    share = len(drawn[0][0]) / len(whole)
    assert abs(share - (0.49 if kind == "node_dropout" else 0.7)) < 0.15
    if kind == "node_dropout":  # an edge is there unless one of its ends lost all
        users, items = ({pair[side] for pair in drawn[0][0]} for side in (0, 1))
        assert drawn[0][0] == {(user, item) for user, item in whole if user in users and item in items}


def edges_of(graph: Graph) -> set[tuple[int, int]]:
    """The user-item pairs of a graph, after a check that its weights are those of its own degrees."""
    dense = csr(graph.offsets, graph.columns, graph.weights, 71).to_dense()
    degree = (dense > 0).sum(1)
    scale = torch.where(degree > 0, degree.clamp(min=1) ** -0.5, 0.0)
    torch.testing.assert_close(dense, (dense > 0) * scale[:, None] * scale)
    return {(user, node - 40) for user, node in dense.nonzero().tolist() if user < 40}


def test_views_are_a_function_of_seed_and_epoch():
    model = lightgcn(layers=1)

    def drawn(seed: int, epoch: int) -> tuple[frozenset, ...]:
        views = GraphParts(model, "edge_dropout", 0.3, seed)
        views.redraw(epoch)
        return tuple(frozenset(edges_of(graphs[0])) for graphs in views.graphs)

    assert drawn(0, 2) == drawn(0, 2)
    assert len({drawn(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


@pytest.mark.parametrize("shape", [(1001, 64), (333, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_is_uniform_and_follows_the_seed(shape, dtype):
    """In each of the four places that a draw fills, and from place to place."""
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(uniform_like(torch.zeros(shape, dtype=dtype)))
    assert drawn[0].dtype == dtype
    assert drawn[0].shape == shape
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    numbers = drawn[0].double().flatten()
    assert numbers.min() > 0
    assert numbers.max() <= 1
    assert dtype == torch.bfloat16 or numbers.max() < 1
    places = numbers[: len(numbers) // 4 * 4].view(-1, 4).numpy()
    if dtype != torch.bfloat16:
        assert all(kstest(place, "uniform").pvalue > 1e-3 for place in places.T)
    assert places.mean(0) == pytest.approx(0.5, abs=0.04)
    assert np.abs(np.corrcoef(places.T) - np.eye(4)).max() < 5 / len(places) ** 0.5


@pytest.mark.parametrize("with_input", [True, False])
def test_noise_views_are_the_paper_s(double, with_input):
    """Layer by layer as it is written, with the same noise; and the gradient that autograd finds for that."""
    model = lightgcn(with_input=with_input)
    batch = some_batch()
    views = Noise(model, 0.5)
    output = output_of(model, batch)
    torch.manual_seed(3)
    ours = views(output)
    torch.manual_seed(3)
    dense = csr(model.graph.offsets, model.graph.columns, model.graph.weights, 71).to_dense()
    upstream = torch.randn(71, 8, generator=torch.Generator().manual_seed(0))
    for users, items in ours:
        states = [model.nodes]
        for _ in range(model.layers):
            state = dense @ states[-1]
            noise = F.normalize(uniform_like(state), dim=1) * 0.5
            states.append(state + state.sign() * noise)
        expected = torch.stack(states if with_input else states[1:]).mean(0)
        view = torch.cat([users, items])
        torch.testing.assert_close(view, expected)
        assert not items[0].any()
        gradients = [torch.autograd.grad((each * upstream).sum(), model.nodes, retain_graph=True) for each in (view, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("every_node", [True, False])
def test_the_contrast_by_the_book(double, every_node):
    """Softmax over cosines, row by row (all nodes compete) or node by node (those of the batch do)."""
    model, batch = lightgcn(), some_batch()
    views = GraphParts(model, "edge_dropout", 0.3, seed=0)
    views.redraw(0)
    output = output_of(model, batch)
    term = GraphContrastTerm(views, every_node, temperature=0.2)
    expected = 0.0
    for side, index in enumerate((batch["user"], batch["target"])):
        first, second = (F.normalize(view[side], dim=1) for view in views(output))
        rows = index if every_node else index.unique()
        competing = torch.arange(side, len(second)) if every_node else rows
        logits = first[rows] @ second[competing].T / 0.2
        own = (competing[None] == rows[:, None]).long().argmax(1)
        expected += F.cross_entropy(logits, own)
    torch.testing.assert_close(term(output, batch), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_node_counts_as_often_as_it_is_in_the_batch_in_any_precision(dtype):
    """A view of bfloat16, as under bf16-true, and an item that is there more often than bfloat16 can count by ones."""
    torch.manual_seed(0)
    first, second = (torch.randn(9, 4, dtype=dtype) for _ in range(2))
    index = torch.cat([torch.full((1000,), 3), torch.tensor([5])])
    term = GraphContrastTerm(lambda output: (), every_node=True, temperature=1.0)
    contrast = term._contrast(first, second, index)
    plain = F.normalize(first, dim=1).double() @ F.normalize(second, dim=1).double().T
    losses = F.cross_entropy(plain, torch.arange(9), reduction="none")
    assert contrast.item() == pytest.approx(losses[index].mean().item(), rel=0.02 if dtype == torch.bfloat16 else 1e-9)


class SeedAndSave(L.Callback):
    """Draws each step's randomness from its number alone, and saves inside the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        torch.manual_seed(1000 * trainer.current_epoch + batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 1) and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("arguments", [{"view": "edge_dropout"}, {"view": "noise", "against": "batch"}])
def test_a_run_that_goes_on_in_mid_epoch_has_the_same_views(tmp_path, arguments):
    data = random_dataset(users=60, n_items=40)

    def fit(resume: Path | None = None) -> CollaborativeRecommender:
        L.seed_everything(0, verbose=False)
        module = PairDataModule(data, 64, 1, True, seed=0)
        backbone = LightGCN(data.n_users, data.n_items, data.training_pairs, dim=8, layers=2)
        student = CollaborativeRecommender(backbone)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=2,
            callbacks=[SeedAndSave(tmp_path / "half.ckpt"), GraphContrast(**arguments, weight=0.5)],
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(student, datamodule=module, ckpt_path=resume, weights_only=True)
        return student

    whole, resumed = fit(), fit(tmp_path / "half.ckpt")
    assert torch.equal(whole.backbone.nodes, resumed.backbone.nodes)
    assert not whole.backbone.nodes[data.n_users].any(), "the padding row"
    assert all("graph_contrast" not in name for name in whole.state_dict()), "the views are no part of a checkpoint"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"view": "edges"}, "graph_contrast.view.*'edges'"),
        ({"against": "none"}, "graph_contrast.against.*'none'"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"noise": 0.0}, "noise is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"noise": 0.2}, "noise=0.2 has no effect: it belongs to view: noise"),
        ({"view": "noise", "ratio": 0.2}, "ratio=0.2 has no effect"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        GraphContrast(**arguments)
