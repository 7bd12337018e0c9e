"""Contrast between two views of the user-item graph: SGL and SimGCL.

SGL: Wu et al., "Self-supervised Graph Learning for Recommendation", SIGIR 2021 (arXiv 2010.10783): views are random parts of
the graph. SimGCL: Yu et al., "Are Graph Augmentations Necessary? Simple Graph Contrastive Learning for Recommendation", SIGIR
2022 (arXiv 2112.08679): views are the whole graph with noise on every layer.
"""

from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_llmers.backbones.graph import Graph, propagate
from lit_llmers.backbones.lightgcn import LightGCN
from lit_llmers.callbacks.distillation import Distillation, Readers, Term
from lit_llmers.data.loader import Batch
from lit_llmers.errors import UserError, unknown
from lit_llmers.losses.alignment import info_nce_among
from lit_llmers.students.collaborative import CollaborativeRecommender, TableOutput

Tables = tuple[Tensor, Tensor]  # users [U, d], items [n+1, d]
VIEWS = ("edge_dropout", "node_dropout", "random_walk", "noise")


class GraphContrastTerm(Term):
    """InfoNCE of the batch's users and of its targets: which node of the other view is the same one?

    `user` and `item` in the log are the two parts; both weigh the same.

    Args:
        views: makes two views of all users and items from what the student has computed.
        every_node: every node of the other view competes, and the mean is over the batch's rows (SGL, section 3.2);
            otherwise the nodes of the batch do, each once, and the mean is over them (SimGCL's official code).
        temperature: divides the cosines.
    """

    per_target = False

    def __init__(self, views: "GraphParts | Noise", every_node: bool, temperature: float) -> None:
        super().__init__()
        self.views, self.every_node, self.temperature = views, every_node, temperature

    def forward(self, output: TableOutput, batch: Batch) -> Tensor:  # type: ignore[override]
        first, second = self.views(output)
        user = self._contrast(first[0], second[0], batch["user"])
        item = self._contrast(first[1], second[1], batch["target"], padding=1)
        self.parts = {"user": user.detach(), "item": item.detach()}
        return user + item

    def _contrast(self, first: Tensor, second: Tensor, index: Tensor, padding: int = 0) -> Tensor:
        """The mean over the rows `index` `[B]` of the views `[N, d]`, of which the first `padding` rows are none."""
        ones = torch.ones(len(index), device=index.device)  # in bfloat16 a count would stop growing at 256
        count = ones.new_zeros(len(first)).scatter_add(0, index, ones)
        ids = count.nonzero().squeeze(1)  # each once, however often it is in the batch: the same value for less
        if not self.every_node:
            losses = info_nce_among(first[ids], second[ids], temperature=self.temperature)
            return losses.sum() / len(ids)  # not their mean: see `cross_entropy`
        weight = count[ids]
        losses = info_nce_among(first[ids], second[padding:], ids - padding, temperature=self.temperature, weight=weight)
        return losses.sum() / len(index)


class GraphParts:
    """Two random parts of the training graph for each epoch, and what the student says on each (SGL, section 3.1).

    Each keeps what is drawn for it, normalised by its own degrees: `node_dropout` the edges between kept nodes, `edge_dropout`
    kept edges, `random_walk` kept edges drawn anew for each layer.

    Args:
        backbone: the student's.
        kind: of the three.
        ratio: probability that a node or an edge is dropped.
        seed: of all draws, together with the epoch.
    """

    def __init__(self, backbone: LightGCN, kind: str, ratio: float, seed: int) -> None:
        self.backbone, self.kind, self.ratio, self.seed = backbone, kind, ratio, seed
        self.graphs: list[list[Graph]] = []

    def redraw(self, epoch: int) -> None:
        """Draw the parts of this epoch."""
        random = np.random.default_rng([self.seed, epoch])
        parts = self.backbone.layers if self.kind == "random_walk" else 1
        drawn = [[self._draw(random) for _ in range(parts)] for _ in range(2)]
        self.graphs = [part if len(part) > 1 else part * self.backbone.layers for part in drawn]

    def _draw(self, random: np.random.Generator) -> Graph:
        edges = self.backbone.edges
        if self.kind == "node_dropout":
            user = random.random(edges.n_users) >= self.ratio
            item = random.random(edges.n_items + 1) >= self.ratio
            keep = user[edges.user] & item[edges.item]
        else:
            keep = random.random(len(edges.user)) >= self.ratio
        return edges.graph(keep).to(self.backbone.nodes)

    def __call__(self, output: TableOutput) -> list[Tables]:
        backbone = self.backbone
        if not self.graphs:  # as in a plan, in which no training starts
            self.redraw(0)
        means = [propagate(backbone.nodes, graphs, backbone.with_input)[0] for graphs in self.graphs]
        return [backbone.split(mean) for mean in means]


def uniform_like(x: Tensor) -> Tensor:
    """Uniform numbers in 0..1 of the shape and type of `x`; on a CPU they have sixteen bits each.

    Four come from one draw there, in half the time of `torch.rand_like`, which was a fifth of SimGCL's step.
    """
    if x.device.type != "cpu":
        return torch.rand_like(x)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    return bits.view(torch.int16)[: x.numel()].view(x.shape).float().add_(2**15 + 0.5).mul_(2**-16).to(x.dtype)


class Noise:
    """What the student says with uniform noise on every layer: a random vector of length `size` in the orthant of what it
    is added to (SimGCL, section 3), drawn anew at each step.

    Propagation is linear and the sign has no gradient, so a view is the student's own tables plus a constant: its gradient
    needs no pass of its own, and forward a view costs one propagation less than the student.

    Args:
        backbone: the student's.
        size: length of the noise on each layer (the paper's epsilon).
    """

    def __init__(self, backbone: LightGCN, size: float) -> None:
        self.backbone, self.size = backbone, size
        backbone.keep_states = True

    def redraw(self, epoch: int) -> None:
        """Nothing is drawn for an epoch."""

    def __call__(self, output: TableOutput) -> list[Tables]:
        return [self._view(output) for _ in range(2)]

    def _view(self, output: TableOutput) -> Tables:
        backbone = self.backbone
        with torch.no_grad():
            moved = torch.zeros_like(backbone.nodes)  # by how much noise has moved the layer, and all layers together
            total = torch.zeros_like(moved)
            for layer, hop in enumerate(backbone.states[1:]):
                moved = backbone.graph(moved) if layer else moved
                noise = F.normalize(uniform_like(hop), dim=1).mul_(self.size)
                moved = moved + noise.mul_((hop + moved).sign_())
                total += moved
            users, items = backbone.split(total / (backbone.layers + backbone.with_input))
        return output.users + users, output.items + items


class GraphContrast(Distillation):
    """A node is to be closer to itself in another view of the graph than to other nodes.

    SGL is `view: edge_dropout` (or node_dropout, random_walk) with `against: all`, SimGCL is `view: noise` with
    `against: batch`. We differ from SGL's official code in that nodes and edges are dropped independently, as the paper writes,
    and not in an exact number. As there, SGL's views are drawn once for each epoch.

    Args:
        view: what makes the views.
        ratio: of the nodes or edges, dropped (SGL's rho).
        noise: of `noise`: its length on each layer (SimGCL's epsilon).
        against: `all` nodes of the other view compete, or those of the `batch`.
        temperature: divides the cosines (tau).
        weight: factor of the contrast in the student's loss (SGL's lambda_1, SimGCL's lambda).
        decay_epochs: see `Distillation`.

    Raises:
        UserError: an unknown view or competition, a ratio outside 0..1, noise or a temperature that is not positive; or a
            ratio or noise that the view does not read.
    """

    name = "graph_contrast"
    fits = LightGCN
    readers: ClassVar[Readers] = (
        ("view: noise", lambda own: own.view == "noise", ("noise",)),
        ("the other views", lambda own: own.view != "noise", ("ratio",)),
    )

    def __init__(
        self,
        view: str = "edge_dropout",
        ratio: float = 0.1,
        noise: float = 0.1,
        against: str = "all",
        temperature: float = 0.2,
        weight: float = 0.1,
        decay_epochs: int = 0,
    ) -> None:
        super().__init__(weight, decay_epochs)
        if view not in VIEWS:
            raise unknown("view (graph_contrast.view)", view, VIEWS)
        if against not in ("all", "batch"):
            raise unknown("competition (graph_contrast.against)", against, ("all", "batch"))
        if not 0 <= ratio < 1:
            raise UserError(f"graph_contrast: ratio is {ratio}. It is the share that is dropped, from 0 to below 1.")
        for key, value in {"noise": noise, "temperature": temperature}.items():
            if not value > 0:
                raise UserError(f"graph_contrast: {key} is {value}. It must be positive.")
        self.view, self.ratio, self.noise, self.against, self.temperature = view, ratio, noise, against, temperature
        self.check_read()

    @classmethod
    def compares_rows(cls, arguments: dict[str, Any]) -> bool:
        return arguments.get("against") == "batch"

    def build(self, student: Any) -> GraphContrastTerm:
        backbone = student.backbone
        if self.view == "noise":
            views: GraphParts | Noise = Noise(backbone, self.noise)
        else:  # the seed comes from the stage's: nothing is drawn between its seeding and here
            views = GraphParts(backbone, self.view, self.ratio, seed=int(torch.randint(2**31, (), device="cpu")))
        return GraphContrastTerm(views, self.against == "all", self.temperature)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._redraw(trainer, pl_module)  # a run that goes on inside an epoch does not start it

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._redraw(trainer, pl_module)

    def _redraw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CollaborativeRecommender)
        pl_module.terms[self.name].views.redraw(trainer.current_epoch)
