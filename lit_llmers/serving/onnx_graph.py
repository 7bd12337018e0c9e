"""A recommender as one ONNX graph, from histories or users to the scores of the whole catalogue."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_llmers.files import atomic_write
from lit_llmers.fusion import Fusion
from lit_llmers.fusion.text import TextView
from lit_llmers.serving.exported import GRAPH
from lit_llmers.serving.served import served
from lit_llmers.students.recommender import Recommender

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

LARGE = 3 * 2**29  # bytes of weights above which ONNX keeps them in a second file; protobuf ends at 2 GiB


def trace(model: Recommender, max_length: int) -> "ONNXProgram":
    """The model as an ONNX program with a free batch size and length, without the traces of where it was made."""
    backbone = model.backbone
    for name, module in list(backbone.named_modules()):
        if isinstance(module, nn.GRU):
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, _OnnxGRU(module))
    for module in backbone.modules():
        if isinstance(module, Fusion | TextView):
            module.settle()  # the graph holds the table that text became, and not how
    scorer = served(model, max_length)
    example = scorer.example()
    axes = tuple(dict(enumerate(("batch", "length")[: tensor.dim()])) for tensor in example)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            scorer,
            example,
            input_names=scorer.inputs,
            output_names=["scores"],
            dynamic_shapes=(axes,),  # of the one argument *inputs
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with the paths of this machine
    return program


def save_onnx(program: "ONNXProgram", folder: Path, check: Callable[[Path], float]) -> float:
    """Save and check the program; return what the check says. Weights that are `LARGE` go to a second file."""
    import onnx
    import onnx_ir

    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value)
    with ExitStack() as files:  # leaves the weights first and the graph that names them last
        graph = files.enter_context(atomic_write(folder / GRAPH))
        if size <= LARGE:
            onnx_ir.save(program.model, graph)
            return check(graph)
        data = files.enter_context(atomic_write(folder / f"{GRAPH}.data"))
        onnx_ir.save(program.model, graph, external_data=data.name)
        result = check(graph)
        renamed = onnx.load(graph, load_external_data=False)
        for tensor in renamed.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"{GRAPH}.data"
        onnx.save(renamed, graph)
        return result


class _OnnxGRU(nn.Module):
    """ONNX's own GRU operator with the weights of a one-layer `nn.GRU(bias=False, batch_first=True)`.

    PyTorch's exporter fixes the length of a batch-first GRU at that of its example.
    """

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        self.size = gru.hidden_size
        self.inputs, self.hidden = _onnx_gates(gru.weight_ih_l0), _onnx_gates(gru.weight_hh_l0)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        length, batch = x.shape[1], x.shape[0]
        states = torch.onnx.ops.symbolic(
            "GRU",
            (x.transpose(0, 1), self.inputs, self.hidden),
            {"hidden_size": self.size, "linear_before_reset": 1},  # PyTorch's GRU is the variant 1
            dtype=x.dtype,
            shape=(length, 1, batch, self.size),
        )
        return states.squeeze(1).transpose(0, 1), None


def _onnx_gates(weight: Any) -> nn.Parameter:
    """`[1, 3H, .]`: PyTorch has the gates in the order reset, update, new; ONNX update, reset, new."""
    reset, update, new = weight.detach().chunk(3)
    return nn.Parameter(torch.cat([update, reset, new])[None], requires_grad=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from talking about packages that it looks for, deprecations and its optimisations."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
