"""What fusions share: a frozen table of text vectors, and a trained view of it as wide as a backbone's items."""

import weakref
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones import Backbone
from lit_llmers.errors import UserError, unknown
from lit_llmers.text.tables import has_vector

_ACTIVATIONS = {"none": nn.Identity, "gelu": nn.GELU, "relu": nn.ReLU}
_SAMPLE = 4096  # rows of a table that tell its scale


class Kept:
    """A tensor made from weights, kept for as long as it can be used again.

    That is until the weights change, or a gradient came back through it (which frees its graph). So a step makes it once for
    all its readers, and an evaluation once for all its batches. It is no part of a copy or of a file, and nothing is kept while
    a graph is exported. A compiled graph takes it as an input: who asks for it there must be left out of the compilation, or
    what is read and what scores would be made apart, each with a dropout of its own.
    """

    def __init__(self) -> None:
        self._settled: Tensor | None = None
        self.clear()

    def settle(self, value: Tensor) -> None:
        """The weights change no more, as in a model that is served: a graph that is exported holds the tensor alone."""
        self._settled = value.detach()

    def clear(self) -> None:
        self._key: object = None
        self._value: Tensor | None = None

    def get(self, make: Callable[[], Tensor], weights: Iterable[Tensor], anew: bool = False) -> Tensor:
        """The tensor that `make` returns.

        Args:
            weights: what it depends on.
            anew: a forward pass begins. Where gradients are recorded it gets a tensor of its own, for the graph of the last
                pass may be gone at the first of two backward calls.
        """
        if self._settled is not None:
            return self._settled
        if torch.compiler.is_compiling():
            return make()
        weights = list(weights)
        if any(weight.is_inference() for weight in weights):  # they do not say when they change
            return make()
        records = torch.is_grad_enabled()
        mode = (records, torch.is_inference_mode_enabled(), torch.is_autocast_enabled(weights[0].device.type))
        key = (mode, [(weight.data_ptr(), weight.dtype, weight._version) for weight in weights])
        if self._value is None or self._key != key or (anew and records):
            self._key, self._value = key, make()
            if self._value.requires_grad:
                own = weakref.ref(self)
                self._value.register_hook(lambda _: kept.clear() if (kept := own()) else None)
        return self._value

    def __deepcopy__(self, memo: dict) -> "Kept":
        return Kept()

    def __reduce__(self) -> tuple:
        return Kept, ()


class Adapter(nn.Module):
    """Linear layers from `[N, D]` to `[N, d]`; an activation stands between them, or after each with `activate_last`.

    Dropout is on the input of every layer but the first. Without activation the layers are one matrix, and are multiplied with
    each other before they are with the rows: the same numbers for a fraction of the work.

    Args:
        inputs: D.
        outputs: d.
        layers: how many.
        hidden: width between layers; None takes half of D.
        activation: `none`, `gelu` or `relu`.

    Raises:
        UserError: an unknown activation, or no layer.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        layers: int = 2,
        hidden: int | None = None,
        activation: str = "none",
        activate_last: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise unknown("activation (of a text adapter)", activation, _ACTIVATIONS)
        if layers < 1:
            raise UserError(f"A text adapter's layers is {layers}. It must be at least 1.")
        widths = [inputs, *[max(1, inputs // 2) if hidden is None else hidden] * (layers - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(*each) for each in pairwise(widths))
        for weight in self.parameters():
            (nn.init.xavier_normal_ if weight.dim() == 2 else nn.init.zeros_)(weight)
        self.activation, self.dropout = _ACTIVATIONS[activation](), nn.Dropout(dropout)
        self.linear, self.activate_last = activation == "none", activate_last

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        if self.linear and not (self.training and self.dropout.p):
            weight: Tensor = first.weight
            bias: Tensor = first.bias
            for layer in rest:
                weight, bias = layer.weight @ weight, F.linear(bias, layer.weight, layer.bias)
            return F.linear(x, weight, bias)
        x = first(x)
        for layer in rest:
            x = layer(self.dropout(self.activation(x)))
        return self.activation(x) if self.activate_last else x

    def scale(self, x: Tensor, target: float) -> None:
        """Make the root mean square of what `[N, D]` becomes about `target`, with the last layer's weight."""
        last: nn.Linear = self.layers[-1]  # type: ignore[assignment]
        self.eval()  # without dropout
        with torch.no_grad():
            for _ in range(4 if self.activate_last else 1):
                last.weight.mul_(target / self(x).square().mean().sqrt().clamp(min=1e-12))
        self.train()


class TextTable(nn.Module):
    """The frozen vectors `[n+1, D]`. They belong to the stage that made them and are no part of the state dict."""

    vectors: Tensor

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors.detach().to(torch.get_default_dtype()), persistent=False)


class TextView(nn.Module):
    """A trained view of all items' frozen text vectors: row 0, padding, is zero, and so is what is no item.

    Items without a text share one view, what the adapter makes of a zero vector.

    Args:
        items: `[n+1, D]` text vectors.
        backbone: whose items they are.
        adapter: makes `[N, d]` of `[N, D]`.
    """

    def __init__(self, items: Tensor, backbone: Backbone, adapter: nn.Module) -> None:
        super().__init__()
        self.source, self.adapter = TextTable(items), adapter
        self._kept = Kept()

    def train(self, mode: bool = True) -> "TextView":
        self._kept.clear()
        return super().train(mode)

    def sample(self) -> Tensor:
        """Some rows of the text that are vectors, `[N, D]`: enough to tell a scale by."""
        real = self.source.vectors[has_vector(self.source.vectors)]
        return real[:: max(1, len(real) // _SAMPLE)]

    @torch.compiler.disable
    def table(self, anew: bool = False) -> Tensor:
        """The view of all items, `[n+1, d]`; see `Kept.get` for `anew`."""
        weights = list(self.adapter.parameters())
        return self._kept.get(lambda: F.pad(self._view(self.source.vectors[1:]), (0, 0, 1, 0)), weights, anew)

    def settle(self) -> None:
        """From now on the view is a constant, see `Kept.settle`."""
        self._kept.settle(self.table())

    def rows(self, items: Tensor, whole: bool = True) -> Tensor:
        """The view of the items `[...]`, `[..., d]`, as a forward pass begins.

        Args:
            whole: the step reads all of `table` anyway; else a training step makes only what stands in `items`.
        """
        items = items.masked_fill(items >= len(self.source.vectors), 0)  # an item that is hidden has no text
        if whole or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.embedding(items, self.table(anew=True))
        distinct, place = items.unique(return_inverse=True)
        view = self._view(F.embedding(distinct, self.source.vectors)).masked_fill((distinct == 0)[:, None], 0)
        return F.embedding(place, view)

    def _view(self, rows: Tensor) -> Tensor:
        return self.adapter(rows).to(rows.dtype)  # autocast made it smaller


def item_scale(backbone: Backbone) -> float:
    """Root mean square of a backbone's own item vectors."""
    return float(backbone.item_table().detach()[1:].float().square().mean().sqrt())


def drop_tables(backbone: Backbone, keep: Tensor | None = None) -> None:
    """Take a backbone's own item tables away, which nothing reads any more, but for one to `keep`."""
    number = len(backbone.item_table())
    for name, child in list(backbone.named_children()):
        if isinstance(child, nn.Embedding) and child.num_embeddings == number and child.weight is not keep:
            delattr(backbone, name)
    if keep is None and hasattr(backbone, "items"):  # a bare tensor
        del backbone.items


def copy_weights(backbone: Backbone, trained: Backbone, what: str) -> None:
    """Give a backbone the weights of a trained one.

    Raises:
        UserError: they are of different models; `what` names the recipe's key.
    """
    own, theirs = backbone.state_dict(), trained.state_dict()
    wrong = sorted(own.keys() ^ theirs.keys()) or sorted(name for name in own if own[name].shape != theirs[name].shape)
    if wrong:
        raise UserError(
            f"The stage that '{what}' names trained another model: they differ in '{wrong[0]}'. Give both stages the same "
            "student and the same settings of its text adapter."
        )
    backbone.load_state_dict(theirs)
