"""AlphaRec: Sheng et al., "Language Representations Can be What Recommenders Need: Findings and Potentials", ICLR 2025,
2407.05441."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import CollaborativeBackbone
from lit_llmers.backbones.graph import Edges, check_layers, propagate
from lit_llmers.errors import UserError
from lit_llmers.text.reduction import mean_of_histories
from lit_llmers.text.tables import has_vector


class AlphaRec(CollaborativeBackbone):
    """A user is the mean of the texts of his items; one MLP for both sides and the graph make the rest. There is no table.

    Section 4 and the official code (LehengTHU/AlphaRec): `x_0 = MLP(z)` with `z_u` the mean of z over the user's different
    training items and LeakyReLU inside, then LightGCN's propagation and the mean of the layers. A score is `cos(u, i) / tau`:
    users and items leave `forward` with length `tau^-1/2`, so that their dot products train and rank.

    We differ in that an item without text, whose z is zero, is left out of his users' means. Every step puts all nodes
    through the MLP: beside `[U + n, D]` frozen vectors it holds `[U + n, hidden D]` numbers for the way back.

    Args:
        n_users, n_items: nodes; items are numbered from 1.
        item_table: `[n+1, D]` text vectors of the items, frozen. The official ones have length 1; as an encode stage leaves
            them, with entries of mean square 1, a layer's biases do not outweigh them.
        training_pairs: `[E, 2]` int64, user 0..U-1 and item 1..n.
        dim: width of what the MLP makes (D = d).
        layers: propagations.
        hidden: width of the MLP's inner layer in multiples of D (official: 1/2 for D = 3072, 9/32 for 4096, 8 for 768); None
            makes it one linear map without bias, the paper's "linear mapping".
        temperature: tau; .15 or .2 in the paper.

    Raises:
        UserError: there is no text at all, the inner layer has no column, there are fewer layers than none, or the
            temperature is not positive.
    """

    features: Tensor

    def __init__(
        self,
        n_users: int,
        n_items: int,
        item_table: Tensor,
        training_pairs: np.ndarray,
        dim: int = 64,
        layers: int = 2,
        hidden: float | None = 2.0,
        temperature: float = 0.15,
    ) -> None:
        super().__init__()
        check_layers(layers)
        if not temperature > 0:
            raise UserError(f"AlphaRec's temperature is {temperature}. It must be positive.")
        self.layers, self.width, self.dim = layers, dim, dim
        self.n_users, self.n_items, self.temperature = n_users, n_items, temperature
        edges = Edges.of(training_pairs, n_users, n_items)
        self.graph = edges.graph()
        table = item_table.numpy()
        if not has_vector(table)[1:].any():
            raise UserError("No item has a text vector, so nothing can be learned. Name other fields in the encode stage.")
        pairs = np.stack([edges.user, edges.item], 1)
        users = torch.from_numpy(mean_of_histories(table, pairs, n_users))
        self.register_buffer("features", torch.cat([users, item_table]), persistent=False)
        width = item_table.shape[1]
        if hidden is None:
            self.mlp = nn.Sequential(nn.Linear(width, dim, bias=False))
        elif (inner := int(hidden * width)) < 1:
            raise UserError(f"model.hidden is {hidden} of a text vector's {width} columns: none. Choose a larger multiple.")
        else:
            self.mlp = nn.Sequential(nn.Linear(width, inner), nn.LeakyReLU(), nn.Linear(inner, dim))

    def forward(self) -> tuple[Tensor, Tensor]:
        nodes = self.mlp(self.features).to(self.graph.weights.dtype)  # narrower under autocast
        mean, _ = propagate(nodes, [self.graph] * self.layers)
        users, items = (F.normalize(mean, dim=1) * self.temperature**-0.5).split([self.n_users, self.n_items + 1])
        return users, F.pad(items[1:], (0, 0, 1, 0))  # biases reach the padding too
