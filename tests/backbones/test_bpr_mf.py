import torch
from torch.nn import functional as F

from lit_llmers.backbones.bpr_mf import BPRMF

BATCH = {
    "user": torch.tensor([0, 2, 2]),
    "target": torch.tensor([1, 3, 1]),
    "negatives": torch.tensor([[4, 5], [1, 1], [5, 2]]),
}


def test_scores_and_penalty_worked_out_row_by_row():
    torch.manual_seed(0)
    model = BPRMF(4, 5, dim=3, reg=0.1, init_std=1.0)
    users, items = model()
    positive, negative = model.pair_scores(BATCH, users, items)
    squares = 0.0
    for row in range(3):
        user, target = users[BATCH["user"][row]], items[BATCH["target"][row]]
        others = items[BATCH["negatives"][row]]
        torch.testing.assert_close(positive[row], user @ target)
        torch.testing.assert_close(negative[row], others @ user)
        squares += user.square().sum() + target.square().sum() + others.square().sum() / 2
    torch.testing.assert_close(model.penalty(BATCH), 0.1 * squares / 2 / 3)


def test_sparse_gradients_are_the_dense_ones():
    gradients = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = BPRMF(4, 5, dim=3, reg=0.1, init_std=1.0, sparse=sparse)
        positive, negative = model.pair_scores(BATCH, *model())
        (F.softplus(negative - positive[:, None]).mean() + model.penalty(BATCH)).backward()
        gradients.append([model.users.weight.grad, model.items.weight.grad])
    for dense, sparse in zip(*gradients, strict=True):
        assert sparse.is_sparse
        torch.testing.assert_close(sparse.to_dense(), dense)
    assert sorted(set(gradients[1][0].coalesce().indices()[0].tolist())) == [0, 2], "rows of the batch alone"


def test_no_regulariser_costs_nothing():
    assert BPRMF(4, 5, reg=0.0).penalty(BATCH) == 0.0


def test_initial_scale():
    torch.manual_seed(0)
    users, items = BPRMF(1000, 1000, dim=32, init_std=0.05)()
    assert abs(users.std().item() - 0.05) < 0.001
    assert abs(items[1:].std().item() - 0.05) < 0.001
    assert not items[0].any()
