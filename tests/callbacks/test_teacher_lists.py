"""A step reads the lists of the targets that it learns from, and of no others."""

import torch
from ranking_lists import K, Lists, share_of

from lit_llmers.callbacks.teacher_lists import lists_of, read_lists
from lit_llmers.students.output import StudentOutput

KEYS = ("items", "scores", "targets")


class Asked(Lists):
    """Remembers what was asked of it."""

    def read(self, batch, drawn=None):
        self.asked = drawn
        return super().read(batch, drawn)


def test_a_share_of_the_targets_is_drawn_and_no_other_is_read():
    source, batch, seen = Asked(40), {"target_row": torch.arange(40).flip(0)}, torch.zeros(40)
    user = torch.randn(40, 3)
    for seed in range(200):
        torch.manual_seed(seed)
        own = dict(batch)
        read_lists(source, own, KEYS, 0.25, 5, torch.device("cpu"))
        assert torch.equal(source.asked, own["targets"])
        drawn, vectors, items, scores = lists_of(StudentOutput(user, user), own, KEYS)
        assert len(drawn) == len(drawn.unique()) == 10
        assert torch.equal(vectors, user[drawn])
        assert torch.equal(items, source.items.flip(0)[drawn, :5])
        assert torch.equal(scores, source.scores.flip(0)[drawn, :5])
        seen[drawn] += 1
    assert seen.min() > 25, "50 on average, whatever the place"


def test_without_a_share_every_target_has_its_list():
    own = share_of({}, KEYS, 1.0)
    assert "targets" not in own
    drawn, vectors, items, _ = lists_of(StudentOutput(torch.eye(12), torch.eye(12)), own, KEYS)
    assert drawn is None
    assert torch.equal(vectors, torch.eye(12))
    assert items.shape == (12, K)
