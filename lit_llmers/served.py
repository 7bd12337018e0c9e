"""A trained model as an export holds it: from what a user is known by, a history or a row of a table, to all scores.

There are three kinds, as there are of backbones, and each says in one class what it reads and how it scores. Checks,
safetensors, ONNX and PyTorch then treat all alike.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lit_llmers.backbones import Backbone, CollaborativeBackbone, CountingBackbone
from lit_llmers.building import build_backbone, find
from lit_llmers.conf.schema import FitStage, SequenceConfig
from lit_llmers.errors import UserError
from lit_llmers.exported import AGAIN, CONFIG, WEIGHTS
from lit_llmers.students.collaborative import CollaborativeRecommender
from lit_llmers.students.counting import CountingRecommender
from lit_llmers.students.recommender import Recommender
from lit_llmers.students.sequential import SequentialRecommender


class Served(nn.Module):
    """A module from the tensors that `inputs` names to scores `[B, n+1]`; `-inf` for item 0, which is padding.

    Attributes:
        inputs: `items [B, L]` int64, left-padded with 0, and `mask [B, L]` bool; or `user [B]` int64, 0..U-1.
    """

    inputs: ClassVar[tuple[str, ...]] = ("items", "mask")

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.scores(*inputs).index_fill(1, inputs[0].new_zeros(1), float("-inf"))

    def scores(self, *inputs: Tensor) -> Tensor:
        """Scores `[B, n+1]`, of item 0 too."""
        raise NotImplementedError

    def example(self, length: int) -> tuple[Tensor, ...]:
        """Inputs of some rows, whose histories have at most `length` items."""
        items = torch.ones(5, length, dtype=torch.int64)
        items[1:3, 0] = 0
        return items, items > 0


class ServedSequence(Served):
    """The user vector of a history scores the item table."""

    model: SequentialRecommender

    def scores(self, *inputs: Tensor) -> Tensor:
        return self.model.encode(*inputs) @ self.model.item_table().T


class ServedCounts(Served):
    """What was counted scores the items of a history."""

    model: CountingRecommender

    def scores(self, *inputs: Tensor) -> Tensor:
        return self.model.backbone.scores(*inputs)


class ServedTables(Served):
    """A row of the user table scores the item table."""

    inputs = ("user",)
    model: CollaborativeRecommender

    def scores(self, *inputs: Tensor) -> Tensor:
        users, items = self.model.backbone()
        return users[inputs[0]] @ items.T

    def example(self, length: int) -> tuple[Tensor, ...]:
        return (torch.zeros(5, dtype=torch.int64),)


KINDS = {SequentialRecommender: ServedSequence, CollaborativeRecommender: ServedTables, CountingRecommender: ServedCounts}


def served(model: Recommender) -> Served:
    """The model as an export serves it."""
    return next(kind(model) for trained, kind in KINDS.items() if isinstance(model, trained))


class FinalTables(CollaborativeBackbone):
    """What is left of a collaborative model when it is exported: users `[U, d]` and items `[n+1, d]`, without its graph."""

    users: Tensor
    items: Tensor

    def __init__(self, users: Tensor, items: Tensor) -> None:
        super().__init__()
        self.layers, self.width, self.dim = 0, users.shape[1], users.shape[1]
        self.register_buffer("users", users.detach().clone())
        self.register_buffer("items", items.detach().clone())

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.users, self.items


def weights_of(model: Recommender) -> dict[str, Tensor]:
    """The backbone's weights, and what it holds itself beside them, such as a frozen item table."""
    backbone = model.backbone
    held = {name: value for name, value in backbone.named_buffers(recurse=False) if value.numel()}
    return {name: value.detach().cpu().contiguous() for name, value in (held | backbone.state_dict()).items()}


def rebuild(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Recommender:
    """Make the model that `config.json` describes and give it its weights.

    Raises:
        UserError: the weights are of another model.
    """
    with torch.random.fork_rng(devices=[]):  # the initial weights, which are replaced, are not to shift anyone's dice
        model = _without_weights(config)
    backbone = model.backbone
    buffers = [name for name, _ in backbone.named_buffers(recurse=False, remove_duplicate=False)]
    held = [name for name in buffers if name not in backbone.state_dict()]
    for name in held:  # frozen item table, prompt; copied into aligned memory: else the last bit of a score may differ
        if name in weights:
            setattr(backbone, name, weights[name].clone())
    own = backbone.state_dict()
    expected = own.keys() | {name for name in held if backbone.get_buffer(name).numel()}
    wrong = sorted(expected ^ weights.keys()) or sorted(name for name in own if own[name].shape != weights[name].shape)
    if wrong:
        raise UserError(f"{WEIGHTS} is not of the model in {CONFIG}: they differ in '{wrong[0]}'. {AGAIN}")
    backbone.load_state_dict({name: weights[name] for name in own})
    return model.eval()


def _without_weights(config: Mapping[str, Any]) -> Recommender:
    name, n_items, dim = config["backbone"]["name"], config["n_items"], config["dim"]
    cls = find("backbones", name)
    if issubclass(cls, CollaborativeBackbone):
        return CollaborativeRecommender(FinalTables(torch.zeros(config["n_users"], dim), torch.zeros(n_items + 1, dim)))
    offered = {
        "n_items": n_items,
        "n_users": config.get("n_users"),
        "max_length": config["max_length"],
        "item_table": torch.zeros(n_items + 1, dim),
        "training_pairs": np.zeros((0, 2), np.int64),
    }
    arguments = config["backbone"]["arguments"]
    backbone = build_backbone(FitStage(name, arguments, sequences=SequenceConfig(max_length=config["max_length"])), 0, offered)
    if isinstance(backbone, CountingBackbone):
        return CountingRecommender(backbone)
    assert isinstance(backbone, Backbone)
    return SequentialRecommender(backbone)
