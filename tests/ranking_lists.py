"""What tests of ranking distillation share: a teacher's lists in memory, and every method as settings of one callback."""

import torch

from lit_llmers.callbacks.ranking_distillation import RankingDistillation
from lit_llmers.callbacks.teacher_lists import read_lists
from lit_llmers.students.output import StudentOutput

N_ITEMS, K = 30, 8
NOTHING_MET = torch.zeros(2, 0, dtype=torch.int64).unbind()
POPULARITY = torch.arange(N_ITEMS + 1).flip(0) ** 2
METHODS = {
    "dllm2rec": {
        "loss": "bce",
        "negatives": 1,
        "weights": {"position": 0.3, "confidence": 0.5, "consistency": 0.1},
        "rank_samples": None,
        "weight": 0.8,
    },
    "dllm2rec with dros": {"negatives": 1, "weights": {"position": 0.3}, "dros": 0.5},
    "rd": {"weights": {"position": 1.0, "discrepancy": 1.0}, "combine": "product", "start_epoch": 1},
    "rrd": {"loss": "listwise", "uninteresting": 6},
    "rrd by rank": {"loss": "listwise", "sampler": "rank", "k": 4},
    "dcd": {"loss": "listwise", "k": 4, "uninteresting": 6, "underestimated": 4, "overestimated": 4},
    "bce by discrepancy": {"sampler": "discrepancy", "k": 4},
    "unkd": {"loss": "pairwise", "pairs": 12, "rank_temperature": 20.0},
    "soft top-k": {"loss": "softmax", "temperature": 2.0},
    "dllm2rec by softmax": {"loss": "softmax", "over": "catalogue", "weights": {"position": 0.3, "confidence": 0.5}},
    "soft top-k of all": {"loss": "softmax", "over": "catalogue", "k": 5},
}


class Lists:
    """A teacher's record: for target r always the same list of different items, shorter for some."""

    k = K

    def __init__(self, targets: int) -> None:
        generator = torch.Generator().manual_seed(3)
        order = torch.rand(targets, N_ITEMS, generator=generator)
        order -= torch.arange(N_ITEMS) * 7 % N_ITEMS / 10  # there is an order to be learnt, and noise
        self.items = order.argsort(1, descending=True)[:, :K] + 1
        self.scores = -torch.rand(targets, K, generator=generator).cumsum(1)
        self.items[::7, 5:] = 0
        self.items[3:4] = 0

    def read(self, batch, drawn=None):
        row = batch["target_row"] if drawn is None else batch["target_row"][drawn]
        return self.items[row], self.scores[row]


def student(reduce=None):
    return type("", (), {"reduce": staticmethod(reduce or (lambda loss, batch: loss.mean()))})()


def term(targets: int = 12, reduce=None, **settings):
    return RankingDistillation(Lists(targets), POPULARITY, **settings).build(student(reduce))


def case(targets: int = 12, dim: int = 4):
    generator = torch.Generator().manual_seed(0)
    user = torch.randn(targets, dim, generator=generator, dtype=torch.float64).requires_grad_()
    table = torch.randn(N_ITEMS + 1, dim, generator=generator, dtype=torch.float64)
    table[0] = 0
    lists = Lists(targets)
    batch = {"teacher_items": lists.items, "teacher_scores": lists.scores}
    batch["target"] = torch.randint(1, N_ITEMS + 1, (targets,), generator=generator)
    batch["items"] = torch.zeros(targets, 1, dtype=torch.int64)  # nothing came before
    return StudentOutput(user, table.requires_grad_()), batch


def share_of(batch, keys, share: float):
    """The batch with the lists of a share of its targets."""
    own = batch | {"target_row": torch.arange(12)}
    read_lists(Lists(12), own, keys, share, None, torch.device("cpu"))
    return own
