"""InfoNCE against plain loops, SGL's official numbers and finite differences."""

import math

import pytest
import torch
from torch.nn import functional as F

from lit_llmers.losses.alignment import info_nce, info_nce_among
from lit_llmers.losses.sampled import bpr


def vectors(*rows: int, dim=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, dim, dtype=torch.float64, generator=generator).requires_grad_() for n in rows]


def similarity(x: torch.Tensor, y: torch.Tensor, cosine: bool) -> float:
    return (x @ y / (x.norm() * y.norm() if cosine else 1)).item()


@pytest.mark.parametrize("cosine", [True, False])
def test_equals_plain_loops(cosine):
    anchor, positive, negatives = vectors(6, 6, 4)
    given = info_nce(anchor, positive, negatives, temperature=0.4, cosine=cosine)
    batch = info_nce(anchor, positive, temperature=0.4, cosine=cosine)
    for row in range(6):
        own = math.exp(similarity(anchor[row], positive[row], cosine) / 0.4)
        others = [[math.exp(similarity(anchor[row], y, cosine) / 0.4) for y in ys] for ys in (negatives, positive)]
        assert given[row].item() == pytest.approx(-math.log(own / (own + sum(others[0]))))
        assert batch[row].item() == pytest.approx(-math.log(own / sum(others[1])))


def test_views_of_a_batch_without_the_anchor_itself():
    views = vectors(8)[0]
    other = torch.arange(8).roll(4)
    loss = info_nce_among(views, views, other, torch.arange(8), temperature=0.5)
    unit = F.normalize(views, dim=1)
    for row in range(8):
        rest = torch.stack([unit[row] @ unit[j] / 0.5 for j in range(8) if j != row])
        assert loss[row].item() == pytest.approx((rest.logsumexp(0) - unit[row] @ unit[other[row]] / 0.5).item())


def test_positives_among_all_candidates_are_the_same_as_given_apart_from_them():
    anchor, table = vectors(3, 7)
    own = torch.tensor([4, 0, 6])
    among = info_nce_among(anchor, table, own, temperature=0.2)
    for row in range(3):
        others = table[torch.arange(7) != own[row]]
        apart = info_nce(anchor[row : row + 1], table[own[row]][None], others, temperature=0.2)
        torch.testing.assert_close(among[row : row + 1], apart)


def test_a_perfect_match_among_orthogonal_ones_goes_to_zero_and_chance_costs_log_n():
    eye = torch.eye(4)
    assert info_nce(eye, eye, temperature=0.01).max().item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(info_nce(torch.ones(4, 4), torch.ones(4, 4), temperature=0.1), torch.full((4,), math.log(4)))
    assert info_nce(eye[:1], eye[1:2], temperature=0.1).item() == 0, "a single anchor has nothing to tell apart"


def test_large_similarities_do_not_overflow():
    anchor, positive, negatives = (1000 * x for x in vectors(6, 6, 4))
    for loss in (
        info_nce(anchor, positive, temperature=0.1, cosine=False),
        info_nce(anchor, positive, negatives, temperature=0.1, cosine=False),
    ):
        assert loss.isfinite().all()


@pytest.mark.parametrize("cosine", [True, False])
def test_gradients(cosine):
    anchor, positive, negatives = vectors(3, 3, 4)
    options = {"temperature": 0.7, "cosine": cosine}
    assert torch.autograd.gradcheck(lambda *x: info_nce(*x, **options), (anchor, positive))
    assert torch.autograd.gradcheck(lambda *x: info_nce(*x, **options), (anchor, positive, negatives))
    among = [torch.tensor([2, 0, 1]), torch.tensor([0, 3, 2])]
    assert torch.autograd.gradcheck(lambda *x: info_nce_among(*x, *among, **options), (anchor, negatives))


def test_golden_sgl_contrasts_with_all_users_and_all_items_and_its_bpr(golden):
    z = golden("backbone_sgl/case_a")
    parameters = [z[f"param.{kind}_embeddings.weight"].requires_grad_() for kind in ("user", "item")]

    def view(graphs):
        layers = [torch.cat(parameters)]
        for graph in graphs:
            layers.append(graph @ layers[-1])
        return torch.stack(layers).mean(0).split([len(x) for x in parameters])

    one, two = view(z["in.sub_graph1"]), view(z["in.sub_graph2"])
    rows, tau = (z["in.users"], z["in.items_pos"]), z["hp.ssl_temp"].item()
    contrast = sum(info_nce_among(a[i], b, i, temperature=tau).sum() for a, b, i in zip(one, two, rows, strict=True))
    users, items = view([z["in.graph"]] * int(z["hp.layers"]))
    user = users[rows[0]]
    task = bpr((user * items[rows[1]]).sum(1), (user * items[z["in.items_neg"]]).sum(1, keepdim=True)).sum()
    torch.testing.assert_close(contrast, z["out.infonce"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(task, z["out.bpr"], rtol=1e-9, atol=1e-10)
    penalty = (
        sum(
            x[i].square().sum()
            for x, i in ((parameters[0], rows[0]), (parameters[1], rows[1]), (parameters[1], z["in.items_neg"]))
        )
        / 2
    )
    total = task + z["hp.reg"] * penalty + z["hp.ssl_reg"] * contrast
    for parameter, kind in zip(parameters, ("user", "item"), strict=True):
        expected = z[f"grad.param.{kind}_embeddings.weight"]
        torch.testing.assert_close(torch.autograd.grad(total, parameter, retain_graph=True)[0], expected, rtol=1e-7, atol=1e-9)
