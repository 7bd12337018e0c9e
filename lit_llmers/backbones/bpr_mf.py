"""BPR-MF: Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009, 1205.2618."""

from torch import Tensor, nn

from lit_llmers.backbones import Batch, CollaborativeBackbone
from lit_llmers.backbones.items import item_embedding
from lit_llmers.backbones.rows import half_squares, occurrences, pair_scores


class BPRMF(CollaborativeBackbone):
    """Matrix factorisation: a user's score of an item is the dot product of their embeddings (section 4.3.1).

    We differ from the paper in the optimiser: Adam on mini-batches in place of SGD on single triples. There are no biases.

    Args:
        n_users, n_items: rows of the two tables; items are numbered from 1.
        dim: width of both (D = d).
        reg: lambda of BPR-Opt, one for all: weighs half the squares of the embeddings of a row's user, target and negatives
            (their mean), averaged over the batch.
        init_std: standard deviation of the initial embeddings.
    """

    def __init__(self, n_users: int, n_items: int, dim: int = 64, reg: float = 1e-4, init_std: float = 0.1) -> None:
        super().__init__()
        self.layers, self.width, self.dim, self.reg = 0, dim, dim, reg
        self.users = nn.Embedding(n_users, dim)
        nn.init.normal_(self.users.weight, std=init_std)
        self.items = item_embedding(n_items, dim, init_std, None)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.users.weight, self.items.weight

    def pair_scores(self, batch: Batch, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        return pair_scores(batch, users, items)

    def penalty(self, batch: Batch) -> Tensor | float:
        if not self.reg:
            return 0.0
        tables = self()
        count = occurrences(batch, len(tables[0]), len(tables[1]) - 1)
        squares = [half_squares(table, own) for table, own in zip(tables, count, strict=True)]
        return (squares[0] + squares[1]) * (self.reg / len(batch["user"]))
