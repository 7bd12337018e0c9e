import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_llmers import recipes
from lit_llmers.composing.resolving import resolve
from lit_llmers.errors import UserError
from lit_llmers.optimizer import RowwiseAdamW


def trained(kind: type, batches: list[list[int]], sparse: bool, **settings: float) -> tuple[nn.Embedding, nn.Linear]:
    """A table of six rows and a layer after a step on the rows of each batch."""
    torch.manual_seed(0)
    table, layer = nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 2)
    adam = kind([*table.parameters(), *layer.parameters()], lr=0.1, **settings)
    for rows in batches:
        adam.zero_grad()
        layer(table(torch.tensor(rows))).square().sum().backward()
        adam.step()
    return table, layer


def test_where_every_row_is_met_it_is_adamw():
    batches = [[0, 1, 2, 3, 4, 5, 5, 5], [5, 4, 3, 2, 1, 0, 0]] * 5
    for rowwise, plain in zip(
        trained(RowwiseAdamW, batches, sparse=True, weight_decay=0.0),
        trained(torch.optim.AdamW, batches, sparse=False, weight_decay=0.0),
        strict=True,
    ):
        torch.testing.assert_close(list(rowwise.parameters()), list(plain.parameters()))


def test_it_is_adamw_on_gradients_that_are_not_sparse():
    batches = [[0, 1], [2, 2, 3]] * 3
    for rowwise, plain in zip(
        trained(RowwiseAdamW, batches, sparse=False, weight_decay=0.1),
        trained(torch.optim.AdamW, batches, sparse=False, weight_decay=0.1),
        strict=True,
    ):
        torch.testing.assert_close(list(rowwise.parameters()), list(plain.parameters()), rtol=0, atol=0)


def test_rows_that_no_batch_meets_stay_and_the_others_move_as_in_torchs_sparse_adam():
    torch.manual_seed(0)
    ours, theirs = (nn.Embedding(6, 3, sparse=True) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    first = ours.weight.detach().clone()
    pairs = [
        (ours, RowwiseAdamW(ours.parameters(), lr=0.1)),
        (theirs, torch.optim.SparseAdam(list(theirs.parameters()), lr=0.1)),
    ]
    for rows in ([0, 1, 1], [1, 3], [0, 4]):
        for table, adam in pairs:
            adam.zero_grad()
            table(torch.tensor(rows)).pow(3).sum().backward()
            adam.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    assert (ours.weight != first).any(1).tolist() == [True, True, False, True, True, False]


def test_a_state_that_was_saved_goes_on():
    batches = [[0, 1, 1], [1, 3]]
    torch.manual_seed(0)
    table = nn.Embedding(6, 3, sparse=True)
    adam = RowwiseAdamW(table.parameters(), lr=0.1)

    def step(table: nn.Embedding, adam: torch.optim.Optimizer, rows: list[int]) -> None:
        adam.zero_grad()
        table(torch.tensor(rows)).pow(3).sum().backward()
        adam.step()

    step(table, adam, batches[0])
    other = nn.Embedding(6, 3, sparse=True)
    other.load_state_dict(table.state_dict())
    again = RowwiseAdamW(other.parameters(), lr=0.5)
    again.load_state_dict(copy.deepcopy(adam.state_dict()))  # else they would share it
    step(table, adam, batches[1])
    step(other, again, batches[1])
    torch.testing.assert_close(other.weight, table.weight, rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_it_steps_on_what_a_scaled_loss_stands_for(fused):
    """As under 16-mixed: the scaler divides the gradients, and skips the step where one overflows."""
    torch.manual_seed(0)
    scaled, plain = (nn.Embedding(6, 3, sparse=True) for _ in range(2))
    plain.load_state_dict(scaled.state_dict())
    adams = [RowwiseAdamW(table.parameters(), lr=0.1, fused=fused) for table in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=65536)
    for rows in ([0, 1, 1], [1, 3]):
        for table, adam in zip((scaled, plain), adams, strict=True):
            adam.zero_grad()
            loss = table(torch.tensor(rows)).pow(3).sum()
            if table is plain:
                loss.backward()
                adam.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(adam)
                scaler.update()
    torch.testing.assert_close(scaled.weight, plain.weight)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(adams[0].state[scaled.weight][name], adams[1].state[plain.weight][name])
    before = scaled.weight.detach().clone()
    scaler.scale(scaled(torch.tensor([2])).sum() * torch.inf).backward()
    scaler.step(adams[0])
    assert torch.equal(scaled.weight, before)


def test_a_closure_computes_gradients():
    table = nn.Embedding(4, 2, sparse=True)
    adam = RowwiseAdamW(table.parameters(), lr=0.1)

    def closure() -> torch.Tensor:
        adam.zero_grad()
        loss = F.mse_loss(table(torch.tensor([1, 2])), torch.ones(2, 2))
        loss.backward()
        return loss

    losses = [adam.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([], r"loss.kind=cross_entropy \(but sampled_softmax, .* do\)"),
        (["student.loss.kind=bce", "optimizer.weight_decay=0.1"], "optimizer.weight_decay"),
        (["student.loss.kind=bce", "trainer.gradient_clip_val=1"], "trainer.gradient_clip_val"),
        (["student=bpr-mf", "optimizer.weight_decay=0.1"], "optimizer.weight_decay"),
    ],
)
def test_what_would_touch_every_row_is_refused(given, named):
    with pytest.raises(UserError, match=f"model.sparse=true.* {named}. Take it out"):
        resolve(recipes.compose("student", [*given, "student.model.sparse=true"]))
