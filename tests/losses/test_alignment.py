"""Alignment against plain loops, official numbers of SGL, RLMRec, LLMEmb, LLM-ESR and PAD, and finite differences."""

import math

import pytest
import torch
from torch.nn import functional as F

from lit_llmers.losses.alignment import cosine, info_nce_among, multi_kernel_mmd, soft_clip
from lit_llmers.losses.sampled import bpr


def vectors(*rows: int, dim=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, dim, dtype=torch.float64, generator=generator).requires_grad_() for n in rows]


def similarity(x: torch.Tensor, y: torch.Tensor, cosine: bool) -> float:
    return (x @ y / (x.norm() * y.norm() if cosine else 1)).item()


@pytest.mark.parametrize("cosine", [True, False])
def test_equals_plain_loops(cosine):
    anchor, positive = vectors(6, 6)
    loss = info_nce_among(anchor, positive, temperature=0.4, cosine=cosine)
    for row in range(6):
        each = [math.exp(similarity(anchor[row], y, cosine) / 0.4) for y in positive]
        assert loss[row].item() == pytest.approx(-math.log(each[row] / sum(each)))


def test_views_of_a_batch_without_the_anchor_itself():
    views = vectors(8)[0]
    other = torch.arange(8).roll(4)
    loss = info_nce_among(views, views, other, torch.arange(8), temperature=0.5)
    unit = F.normalize(views, dim=1)
    for row in range(8):
        rest = torch.stack([unit[row] @ unit[j] / 0.5 for j in range(8) if j != row])
        assert loss[row].item() == pytest.approx((rest.logsumexp(0) - unit[row] @ unit[other[row]] / 0.5).item())


@pytest.mark.parametrize("cosine", [True, False])
def test_positives_anywhere_among_the_candidates(cosine):
    anchor, table = vectors(3, 7)
    own = torch.tensor([4, 0, 6])
    among = info_nce_among(anchor, table, own, temperature=0.4, cosine=cosine)
    for row in range(3):
        each = [math.exp(similarity(anchor[row], y, cosine) / 0.4) for y in table]
        assert among[row].item() == pytest.approx(-math.log(each[own[row]] / sum(each)))


def test_a_perfect_match_among_orthogonal_ones_goes_to_zero_and_chance_costs_log_n():
    eye = torch.eye(4)
    assert info_nce_among(eye, eye, temperature=0.01).max().item() == pytest.approx(0, abs=1e-6)
    alike = torch.ones(4, 4)
    torch.testing.assert_close(info_nce_among(alike, alike, temperature=0.1), torch.full((4,), math.log(4)))
    assert info_nce_among(eye[:1], eye[1:2], temperature=0.1).item() == 0, "a single anchor has nothing to tell apart"


def test_large_similarities_do_not_overflow():
    anchor, candidates = (1000 * x for x in vectors(6, 6))
    other = torch.arange(6).roll(3)
    for excluded in (None, other):
        assert info_nce_among(anchor, candidates, None, excluded, temperature=0.1, cosine=False).isfinite().all()


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("excluded", [None, torch.tensor([0, 3, 2])])
def test_gradients(cosine, excluded):
    own, options = torch.tensor([2, 0, 1]), {"temperature": 0.7, "cosine": cosine}
    assert torch.autograd.gradcheck(lambda *x: info_nce_among(*x, own, excluded, **options), vectors(3, 4))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cosine", [True, False])
def test_a_contrast_is_in_full_precision_under_autocast(given, cosine):
    views = vectors(32, dim=64)[0].detach().to(given)
    other = torch.arange(32).roll(16)
    for excluded in (None, torch.arange(32)):
        exact = info_nce_among(views.double(), views.double(), other, excluded, temperature=0.05, cosine=cosine)
        with torch.autocast("cpu", torch.bfloat16):
            loss = info_nce_among(views, views, other, excluded, temperature=0.05, cosine=cosine)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-4)


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


def test_golden_soft_clip_with_gradients_through_its_targets_and_its_temperature(golden):
    z = golden("llmemb/case_a_softclip")
    x, y, tau = (value.requires_grad_() for value in (z["in.X"], z["in.Y"], z["hp.tau"]))
    total = soft_clip(x, y, temperature=tau).mean()
    torch.testing.assert_close(total, z["out.total"], rtol=1e-9, atol=1e-10)
    for ours, key in zip(torch.autograd.grad(total, [x, y, tau]), ("X", "Y", "tau"), strict=True):
        torch.testing.assert_close(ours, z[f"grad.{key}"].view_as(ours), rtol=1e-7, atol=1e-9)


def test_golden_llmemb_aligns_its_adapter_with_a_collaborative_table(golden):
    z = golden("llmemb/case_a_student")
    items = z["in.pos"][z["in.pos"] > 0]
    adapted, collaborative = z["out.adapter_table"][items], z["in.collaborative_table"][items - 1]
    value = soft_clip(collaborative, adapted, temperature=z["hp.tau"].item()).mean()
    torch.testing.assert_close(value, z["out.align_loss"], rtol=1e-9, atol=1e-10)


def test_golden_llm_esr_draws_users_to_their_neighbours(golden):
    z = golden("llm_esr/case_a_sasrec_cl_reg")
    value = soft_clip(z["out.user_embedding"], z["out.neighbour_target"], temperature=1.0).mean()
    torch.testing.assert_close(value, z["out.align_loss"], rtol=1e-9, atol=1e-10)


def test_soft_clip_is_the_cross_entropy_of_both_directions():
    x, y = vectors(6, 6)
    target = ((x @ x.T + y @ y.T) * 0.35).softmax(1)
    forth, back = (x @ y.T / 0.7).log_softmax(1), (y @ x.T / 0.7).log_softmax(1)
    expected = -((target * forth).sum(1) + (target.T * back).sum(1)).mean() / 2
    torch.testing.assert_close(soft_clip(x, y, temperature=0.7).mean(), expected)


def test_soft_clip_is_content_when_twins_are_as_alike_as_they_are():
    """At y = x and tau = 1 the prediction is its target, so the loss is the entropy of who is whose twin."""
    x = 5 * torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]]
    x.requires_grad_()
    loss = soft_clip(x, x.detach(), temperature=1.0)
    expected = torch.tensor([math.log(2), math.log(2), 0, 0], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    assert soft_clip(x[[0, 2, 1, 3]], x, temperature=1.0).sum() > loss.sum() + 1


def test_golden_mmd(golden):
    z = golden("pad/case_a_mmd")
    text, ids = z["in.z_s"].requires_grad_(), z["in.z_t"].requires_grad_()
    total = multi_kernel_mmd(text, ids, z["hp.log2_alphas"].tolist())
    torch.testing.assert_close(total + 2 / (len(text) - 1), z["out.total"], rtol=1e-9, atol=1e-10)  # the constant is the code's
    for ours, key in zip(torch.autograd.grad(total, [text, ids]), ("z_s", "z_t"), strict=True):
        torch.testing.assert_close(ours, z[f"grad.{key}"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("powers", [(-3, -2, -1, 0, 1), (0,), (2, -2)])
def test_mmd_by_plain_autograd(powers):
    x, y = vectors(5, 5)
    z = torch.cat([x, y])
    distance = (z[:, None] - z).square().sum(2)
    mean = distance.mean().detach()
    kernel = sum((-distance / (2 * 2.0**power * mean)).exp() for power in powers)
    of_pairs = kernel[:5, :5].sum() + kernel[5:, 5:].sum() - 10 * len(powers)
    expected = of_pairs / 20 - 2 * kernel[:5, 5:].mean()
    value = multi_kernel_mmd(x, y, powers)
    torch.testing.assert_close(value, expected)
    for ours, theirs in zip(torch.autograd.grad(3 * value, [x, y]), torch.autograd.grad(3 * expected, [x, y]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_mmd_tells_distributions_apart_and_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    same, other = [], []
    for _ in range(200):
        x, y = torch.randn(2, 20, 4, generator=generator)
        same.append(multi_kernel_mmd(x, y).item())
        other.append(multi_kernel_mmd(x, y + 1).item())
    assert abs(sum(same) / 200) < 0.02
    assert min(other) > max(0.1, sum(same) / 200)
    single = torch.ones(1, 4, requires_grad=True)
    loss = multi_kernel_mmd(single, 2 * single)
    loss.backward()
    assert loss.item() == 0, "one vector is no distribution"
    assert multi_kernel_mmd(torch.ones(3, 4), torch.ones(3, 4)).item() == pytest.approx(0, abs=1e-6)


def test_mmd_moves_a_cloud_onto_another():
    torch.manual_seed(0)
    x, y = torch.nn.Parameter(torch.randn(40, 3) + 3), torch.randn(40, 3)
    adam = torch.optim.Adam([x], lr=0.1)
    for _ in range(150):
        adam.zero_grad()
        multi_kernel_mmd(x, y).backward()
        adam.step()
    assert (x.mean(0) - y.mean(0)).norm() < 0.2 * 3 * 3**0.5


def test_cosine_is_zero_for_the_same_direction_and_moves_both_sides():
    x, y = vectors(4, 4)
    torch.testing.assert_close(cosine(x, 3 * x), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(cosine(x, -x), torch.full((4,), 2.0, dtype=torch.float64))
    assert cosine(x, y)[1].item() == pytest.approx(1 - similarity(x[1], y[1], True))
    cosine(x, y).sum().backward()
    assert x.grad.any()
    assert y.grad.any()


def perceptron(z: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    inner = F.leaky_relu(F.linear(rows, z["param.mlp.0.weight"], z["param.mlp.0.bias"]))
    return F.linear(inner, z["param.mlp.2.weight"], z["param.mlp.2.bias"])


def propagated(z: dict[str, torch.Tensor], nodes: torch.Tensor) -> torch.Tensor:
    """RLMRec's LightGCN: the sum of the layers."""
    layers = [nodes]
    for _ in range(int(z["hp.layer_num"])):
        layers.append(z["in.adj_normalised"] @ layers[-1])
    return torch.stack(layers).sum(0)


def assert_rlmrec_gradients(z, total: torch.Tensor) -> None:
    names = [key for key in z if key.startswith("param.")]
    for name, ours in zip(names, torch.autograd.grad(total, [z[name] for name in names]), strict=True):
        torch.testing.assert_close(ours, z[f"grad.{name}"], rtol=1e-6, atol=1e-9)


def rlmrec(z: dict[str, torch.Tensor], users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Its own loss and the L2 term of all parameters."""
    user, positive, negative = users[z["in.users"]], items[z["in.items_pos"]], items[z["in.items_neg"]]
    task = bpr((user * positive).sum(1), (user * negative).sum(1, keepdim=True)).mean()
    torch.testing.assert_close(task, z["out.bpr_loss"], rtol=1e-9, atol=1e-10)
    return task + z["hp.reg_weight"] * sum(z[key].square().sum() for key in z if key.startswith("param."))


def test_golden_rlmrec_con(golden):
    """With its false negatives; the official code's epsilons let agree no more than 1e-6."""
    z = golden("rlmrec/case_a_con")
    for key in [key for key in z if key.startswith("param.")]:
        z[key].requires_grad_()
    users, items = propagated(z, torch.cat([z["param.user_embeds"], z["param.item_embeds"]])).split([7, 9])
    of_users, of_items = perceptron(z, z["in.user_semantic"]), perceptron(z, z["in.item_semantic"])
    tau = z["hp.kd_temperature"].item()
    contrast = info_nce_among(users[z["in.users"]], of_users, z["in.users"], temperature=tau).mean()
    for side in ("pos", "neg"):
        index = z[f"in.items_{side}"]
        contrast = contrast + info_nce_among(items[index], of_items[index], temperature=tau).mean()
    contrast = contrast * z["hp.kd_weight"]
    torch.testing.assert_close(contrast, z["out.kd_loss"], rtol=1e-6, atol=1e-10)
    total = rlmrec(z, users, items) + contrast
    torch.testing.assert_close(total, z["out.total"], rtol=1e-6, atol=1e-10)
    assert_rlmrec_gradients(z, total)


def test_golden_rlmrec_gen(golden):
    """The student's own loss reads the graph with hidden nodes too."""
    z = golden("rlmrec/case_a_gen")
    for key in [key for key in z if key.startswith("param.")]:
        z[key].requires_grad_()
    nodes, hidden = torch.cat([z["param.user_embeds"], z["param.item_embeds"]]), z["in.masked_nodes"]
    nodes = nodes.index_copy(0, hidden, z["param.masker.mask_token"].expand(len(hidden), -1))
    read = propagated(z, nodes)
    torch.testing.assert_close(read, z["out.final_embeddings"], rtol=1e-9, atol=1e-10)
    text = torch.cat([z["in.user_semantic"], z["in.item_semantic"]])[hidden]
    decoded = perceptron(z, read[hidden])
    recovered = info_nce_among(decoded, text, temperature=z["hp.re_temperature"].item()).mean() * z["hp.recon_weight"]
    torch.testing.assert_close(recovered, z["out.recon_loss"], rtol=1e-6, atol=1e-10)
    total = rlmrec(z, *read.split([7, 9])) + recovered
    torch.testing.assert_close(total, z["out.total"], rtol=1e-6, atol=1e-10)
    assert_rlmrec_gradients(z, total)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_soft_clip_of_long_vectors_is_in_full_precision_under_autocast(given):
    x, y = (torch.randn(32, 512, generator=torch.Generator().manual_seed(seed)).mul(0.5).to(given) for seed in (0, 1))
    plain = soft_clip(x.float(), y.float(), temperature=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        half = soft_clip(x, y, temperature=3.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain)
