"""RLMRec-Gen: the official numbers through the student, and that nothing is hidden outside a training step."""

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from test_embedding_distillation import fit
from tiny import random_dataset
from torch.nn import functional as F

from lit_llmers.backbones.bpr_mf import BPRMF
from lit_llmers.backbones.lightgcn import LightGCN
from lit_llmers.callbacks.masked_reconstruction import KEY, MaskedReconstruction, hide
from lit_llmers.errors import UserError
from lit_llmers.students.collaborative import CollaborativeRecommender

GENERATOR = torch.Generator().manual_seed(1)
ITEMS, USERS = torch.randn(51, 6, generator=GENERATOR), torch.randn(60, 6, generator=GENERATOR)
ITEMS[0] = 0


@pytest.fixture
def double():
    """Build in float64, so that the graph's weights are exact too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def student_of(dim: int = 8, layers: int = 2) -> CollaborativeRecommender:
    torch.manual_seed(0)
    data = random_dataset(users=60, n_items=50)
    return CollaborativeRecommender(LightGCN(60, 50, data.training_pairs, dim=dim, layers=layers, init_std=0.5))


def test_golden_student_and_term_read_one_pass_with_hidden_nodes(golden, double):
    """Official layers are summed, so ours start from embeddings that are as many times larger. An epsilon is left out."""
    z = golden("rlmrec/case_a_gen")
    pairs = z["in.interactions"].nonzero().numpy() + np.array([0, 1])
    layers = int(z["hp.layer_num"])
    student = CollaborativeRecommender(LightGCN(7, 9, pairs, dim=6, layers=layers, reg=0.0))
    backbone, scale = student.backbone, layers + 1
    official = torch.cat([z["param.user_embeds"], torch.zeros(1, 6), z["param.item_embeds"]])
    items = F.pad(z["in.item_semantic"], (0, 0, 1, 0))
    callback = MaskedReconstruction(items, z["in.user_semantic"], temperature=z["hp.re_temperature"].item())
    term = callback.build(student)
    with torch.no_grad():
        backbone.nodes.copy_(official * scale)
        term.token.copy_(z["param.masker.mask_token"][0] * scale)
    term.decoder.load_state_dict({key[len("param.mlp.") :]: z[key] for key in z if key.startswith("param.mlp.")})
    batch = {"user": z["in.users"], "target": z["in.items_pos"] + 1, "negatives": z["in.items_neg"][:, None] + 1}
    batch[KEY] = z["in.masked_nodes"] + (z["in.masked_nodes"] >= 7)
    hide(backbone, batch[KEY], term.token)
    output = student(batch)
    everything = torch.cat([output.users, output.items[1:]])
    torch.testing.assert_close(everything, z["out.final_embeddings"], rtol=1e-9, atol=1e-10)
    task, recovered = student.task_loss(output, batch), term(output, batch) * z["hp.recon_weight"]
    torch.testing.assert_close(task, z["out.bpr_loss"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(recovered, z["out.recon_loss"], rtol=1e-6, atol=1e-10)
    regular = sum(z[key].square().sum() for key in z if key.startswith("param."))
    total = task + recovered + z["hp.reg_weight"] * regular
    torch.testing.assert_close(total, z["out.total"], rtol=1e-6, atol=1e-10)
    (task + recovered).backward()
    reg = 2 * z["hp.reg_weight"]
    for ours, name in (
        (backbone.nodes.grad[:7] * scale, "user_embeds"),
        (backbone.nodes.grad[8:] * scale, "item_embeds"),
        (term.token.grad[None] * scale, "masker.mask_token"),
        *((parameter.grad, f"mlp.{key}") for key, parameter in term.decoder.named_parameters()),
    ):
        expected = z[f"grad.param.{name}"] - reg * z[f"param.{name}"]
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_nodes_are_hidden_for_one_pass_alone():
    backbone = student_of().backbone
    seen = backbone()
    token, nodes = torch.full((8,), 9.0), torch.tensor([3, 70])
    hide(backbone, nodes, token)
    hidden = backbone()
    table = backbone.nodes.detach().clone()
    table[nodes] = 9.0
    kept = backbone.nodes.data
    backbone.nodes.data = table
    for ours, theirs in zip(hidden, backbone(), strict=True):
        torch.testing.assert_close(ours, theirs)
    backbone.nodes.data = kept
    for ours, theirs in zip(backbone(), seen, strict=True):
        assert torch.equal(ours, theirs)
    assert "nodes" not in vars(backbone)
    assert backbone.nodes is dict(backbone.named_parameters())["nodes"]


def test_a_pass_that_fails_hides_nothing_either(monkeypatch):
    backbone = student_of().backbone
    hide(backbone, torch.tensor([3]), torch.zeros(8))

    def fail(nodes):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(backbone, "split", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        backbone()
    assert "nodes" not in vars(backbone)


def test_what_is_drawn():
    backbone = student_of().backbone
    callback = MaskedReconstruction(ITEMS, USERS, ratio=0.3)
    drawn = [callback.draw(backbone) for _ in range(100)]
    assert {len(each) for each in drawn} == {33}
    assert all(len(each.unique()) == 33 for each in drawn)
    seen = set(torch.cat(drawn).tolist())
    assert seen == set(range(111)) - {60}, "any node but the padding"
    assert len(MaskedReconstruction(ITEMS, USERS, ratio=1e-6).draw(backbone)) == 1


def test_who_has_no_text_is_never_hidden():
    items, users = ITEMS.clone(), USERS.clone()
    items[[1, 50]], users[:10] = 0, 0
    backbone, callback = student_of().backbone, MaskedReconstruction(items, users, ratio=0.5)
    drawn = [callback.draw(backbone) for _ in range(100)]
    assert {len(each) for each in drawn} == {49}
    assert set(torch.cat(drawn).tolist()) == set(range(10, 110)) - {60, 61}


def test_a_share_of_the_hidden_nodes_has_the_loss_of_all_on_average():
    student = student_of()
    output = student({"user": torch.tensor([0]), "target": torch.tensor([1]), "negatives": torch.tensor([[2]])})
    whole, some = (MaskedReconstruction(ITEMS, USERS, ratio=0.2, share=share) for share in (1.0, 0.25))
    term = whole.build(student)
    torch.manual_seed(1)
    few = some.build(student)
    few.load_state_dict(term.state_dict())
    nodes = whole.draw(student.backbone)
    expected = term(output, {KEY: nodes})
    parts = [few(output, {KEY: nodes.roll(shift)}) for shift in range(len(nodes))]
    assert len(nodes) == 22
    torch.testing.assert_close(torch.stack(parts).mean(), expected)
    assert max(parts) > expected + 0.01, "each asks others"


@pytest.mark.parametrize("share", [0, 1.5, -0.1])
def test_a_share_that_is_none(share):
    with pytest.raises(UserError, match=r"masked_reconstruction: share is .* above 0 and at most 1"):
        MaskedReconstruction(ITEMS, USERS, share=share)


class Watch(L.Callback):
    """What the backbone's table is before, in and after a step."""

    def __init__(self) -> None:
        self.hidden: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.hidden.append(len(batch[KEY]))
        self.before = pl_module.backbone.nodes

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        assert pl_module.backbone.nodes is self.before
        assert not pl_module.backbone._forward_hooks
        assert not pl_module.backbone._forward_pre_hooks


def test_training_learns_to_tell_the_texts():
    student = student_of()
    callback = MaskedReconstruction(ITEMS, USERS, ratio=0.2, weight=2.0)
    term = callback.build(student)
    student.distillation["masked_reconstruction"] = term
    student.optimizer = SimpleNamespace(lr=0.02, weight_decay=0.0, warmup_steps=0, schedule="constant")
    batch = {"user": torch.arange(4)}

    def value() -> float:
        total = 0.0
        for seed in range(20):
            torch.manual_seed(seed)
            batch[KEY] = callback.draw(student.backbone)
            hide(student.backbone, batch[KEY], term.token)
            with torch.no_grad():
                total += term(student(batch), batch).item() / 20
        return total

    initial = value()
    watch = Watch()
    fit(student, callback, epochs=8, watch=watch)
    assert set(watch.hidden) == {22}
    assert value() < 0.8 * initial
    assert term.token.any(), "the token is trained"
    assert not student.backbone.nodes[60].any(), "the padding stays zero"
    checkpoint = {"state_dict": dict(student.state_dict())}
    student.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == {"backbone.nodes"}
    assert not [name for name in checkpoint["distillation"] if "signals" in name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.0}, "ratio is 0"),
        ({"ratio": 1.0}, "ratio is 1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"users": USERS[:, :3]}, "items' signals have 6 numbers and the users' 3"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        MaskedReconstruction(**{"items": ITEMS, "users": USERS, **arguments})


def test_it_needs_a_graph():
    assert not issubclass(BPRMF, MaskedReconstruction.fits)
