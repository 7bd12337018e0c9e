import numpy as np
import pytest
import torch

from lit_llmers.backbones.lightgcn import LightGCN
from lit_llmers.backbones.mixgcf import MixGCF
from lit_llmers.callbacks.masked_reconstruction import hide

PAIRS = np.stack([np.random.default_rng(0).integers(0, 9, 50), np.random.default_rng(1).integers(1, 14, 50)], 1)


def some_batch() -> dict[str, torch.Tensor]:
    return {
        "user": torch.randint(0, 9, (20,)).sort().values,
        "target": torch.randint(1, 14, (20,)),
        "negatives": torch.randint(1, 14, (20, 6)),
    }


@pytest.mark.parametrize("with_input", [True, False])
def test_the_negative_is_the_paper_s(with_input):
    """Written with embeddings, as the official code: mix, choose by the pooled user, pool."""
    torch.manual_seed(0)
    model = MixGCF(9, 13, PAIRS, dim=4, layers=2, with_input=with_input, init_std=1.0).train()
    batch = some_batch()
    torch.manual_seed(1)
    users, items = model()
    positive, negative = model.pair_scores(batch, users, items)

    torch.manual_seed(1)
    layers = torch.stack([layer[9:] for layer in model.states[0 if with_input else 1 :]], 1)  # [n+1, l, d]
    share = torch.stack([torch.rand(20) for _ in range(layers.shape[1])], 1)[:, None, :, None]  # [B, 1, l, 1]
    user, target, candidates = users[batch["user"]], layers[batch["target"]], layers[batch["negatives"]]
    mixed = share * target[:, None] + (1 - share) * candidates  # [B, M, l, d]
    hardest = (user[:, None, None] * mixed).sum(3).argmax(1)  # [B, l]
    chosen = mixed.gather(1, hardest[:, None, :, None].expand(-1, 1, -1, 4))[:, 0].mean(1)  # [B, d]
    torch.testing.assert_close(positive, (user * items[batch["target"]]).sum(1))
    torch.testing.assert_close(negative, (user * chosen).sum(1, keepdim=True))
    upstream = torch.randn(20)
    ours = torch.autograd.grad((negative[:, 0] * upstream).sum(), model.nodes, retain_graph=True)
    theirs = torch.autograd.grad(((user * chosen).sum(1) * upstream).sum(), model.nodes)
    torch.testing.assert_close(ours, theirs)


def test_it_scores_as_lightgcn_and_keeps_no_layers_when_it_does():
    torch.manual_seed(0)
    model = MixGCF(9, 13, PAIRS, dim=4, layers=2)
    plain = LightGCN(9, 13, PAIRS, dim=4, layers=2)
    plain.load_state_dict(model.state_dict())
    for ours, theirs in zip(model.eval()(), plain.eval()(), strict=True):
        assert torch.equal(ours, theirs)
    assert model.states == ()
    with pytest.raises(RuntimeError, match="training mode"):
        model.pair_scores(some_batch(), *model())


def test_what_a_hidden_node_is_stays_hidden_from_the_negatives():
    """All layers that are mixed are of the pass with the token, the first among them."""
    torch.manual_seed(0)
    model = MixGCF(9, 13, PAIRS, dim=4, layers=2, init_std=1.0).train()
    batch, token, nodes = some_batch(), torch.ones(4), torch.tensor([3, 10, 14])
    scores = []
    for other in (0.0, 5.0):
        with torch.no_grad():
            model.nodes[nodes] += other
            hide(model, nodes, token)
            torch.manual_seed(1)
            scores.append(model.pair_scores(batch, *model()))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=0)
