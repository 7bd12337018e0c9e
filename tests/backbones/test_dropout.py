"""Dropout from random bytes has to be dropout."""

import pytest
import torch

from lit_llmers.backbones.dropout import Dropout

ONES = torch.ones(1_000_003)  # not a multiple of the eight that one draw gives


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_share_and_expectation(p):
    torch.manual_seed(0)
    dropped = Dropout(p)(ONES)
    assert dropped.unique().tolist() == pytest.approx([0, 256 / (256 - round(256 * p))])
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=3e-3), "p is rounded to 1/256"
    assert dropped.mean().item() == pytest.approx(1, abs=3e-3), "and the scale goes with it"


def test_the_largest_probabilities():
    """Where all is dropped nothing stays, and below that a share stays, of which there are none smaller than 1/256."""
    assert not Dropout(1.0)(ONES).any()
    assert torch.equal(Dropout(1.0).add(ONES, ONES), ONES)
    torch.manual_seed(0)
    dropped = Dropout(0.999)(ONES)
    assert dropped.unique().tolist() == [0, 256]
    assert dropped.mean().item() == pytest.approx(1, abs=0.1)


def test_neighbours_are_independent():
    """The eight elements of one draw, its highest bits included."""
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(800_000)) > 0).float().view(-1, 8)
    assert (torch.corrcoef(kept.T) - torch.eye(8)).abs().max() < 0.02
    assert (kept.mean(0) - 0.5).abs().max() < 0.01


def test_a_seed_fixes_it_and_another_does_not():
    layer, drawn = Dropout(0.3), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(layer(ONES[:1000]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_gradient_flows_where_something_stayed_and_adding_is_the_sum():
    layer, x = Dropout(0.4), torch.randn(50, 7, requires_grad=True)
    residual = torch.randn(50, 7)
    torch.manual_seed(3)
    plain = residual + layer(x)
    torch.manual_seed(3)
    fused = layer.add(residual, x)
    torch.testing.assert_close(fused, plain)
    fused.sum().backward()
    torch.testing.assert_close(x.grad * x, fused.detach() - residual, rtol=1e-4, atol=1e-5)


def test_evaluation_and_zero_change_nothing():
    x = torch.randn(9)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(0.5).eval().add(x, x), x + x)
    with pytest.raises(ValueError, match="probability"):
        Dropout(1.5)
