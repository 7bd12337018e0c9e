"""The collaborative recommender: users and items are rows of two tables, learned from pairs."""

from functools import cached_property

from torch import Tensor

from lit_llmers.backbones import CollaborativeBackbone
from lit_llmers.conf.schema import LossConfig, OptimizerConfig
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError
from lit_llmers.losses import sampled
from lit_llmers.ranking import Catalogue
from lit_llmers.students.output import StudentOutput
from lit_llmers.students.recommender import Recommender

Tables = tuple[Tensor, Catalogue]
PAIRWISE = {"bpr": sampled.bpr, "bce": sampled.binary, "sampled_softmax": sampled.own_softmax}


class TableOutput(StudentOutput):
    """The tables that a collaborative model scores with. Its `user` is picked from them when a loss term asks for it.

    Attributes:
        users: `[U, d]` all users; those of the batch are `index` `[B]`.
        items: `[n+1, d]`.
    """

    users: Tensor
    index: Tensor

    def __init__(self, users: Tensor, items: Tensor, index: Tensor) -> None:
        vars(self).update(users=users, items=items, hidden=None, index=index)

    @cached_property
    def user(self) -> Tensor:
        """`[B, d]`."""
        return self.users.index_select(0, self.index)


class CollaborativeRecommender(Recommender):
    """Learns to score what a user has met above what it has not; the batches bring the negatives.

    Args:
        backbone: see `lit_llmers.backbones`.
        optimizer: AdamW's settings.
        loss: `bpr`, `bce` or `sampled_softmax`.
        ks: cut-offs of the validation metrics.

    Raises:
        UserError: another loss.
    """

    backbone: CollaborativeBackbone

    def __init__(
        self,
        backbone: CollaborativeBackbone,
        optimizer: OptimizerConfig | None = None,
        loss: LossConfig | None = None,
        ks: tuple[int, ...] = (5, 10, 20),
    ) -> None:
        super().__init__(backbone, optimizer, ks)
        self.loss = loss or LossConfig(kind="bpr", negatives=1)
        if self.loss.kind not in PAIRWISE:
            raise UserError(f"loss.kind is {self.loss.kind}, but a collaborative student takes {' or '.join(PAIRWISE)}.")

    def forward(self, batch: Batch, with_hidden: bool = False) -> TableOutput:
        users, items = self.backbone()
        return TableOutput(users, items, batch["user"])

    def task_loss(self, output: TableOutput, batch: Batch) -> Tensor:  # type: ignore[override]
        positive, negative = self.backbone.pair_scores(batch, output.users, output.items)
        return self.reduce(PAIRWISE[self.loss.kind](positive, negative), batch) + self.backbone.penalty(batch)

    def item_table(self) -> Tensor:
        """`[n+1, d]` as it scores, row 0 is padding."""
        return self.backbone()[1]

    def tables(self) -> Tables:
        """All users `[U, d]`, and all items."""
        users, items = self.backbone()
        return users, Catalogue(items)

    def vectors(self, batch: Batch, tables: Tables) -> tuple[Tensor, Catalogue]:
        return tables[0][batch["user"]], tables[1]
