"""The loss of one's own in docs/methods.md, as it stands there."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from lit_llmers.backbones.gru4rec import GRU4Rec
from lit_llmers.backbones.lightgcn import LightGCN
from lit_llmers.students.output import StudentOutput

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_page_s_own_loss(monkeypatch):
    section = PAGE.read_text().split("## A loss of your own")[1].split("\n## ")[0]
    loss, callback = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.setitem(sys.modules, "lit_llmers.losses.norm", norm := ModuleType("norm"))
    exec(loss, vars(norm))
    found: dict = {}
    exec(callback, found)
    term = found["ShortUsers"](power=2.0, weight=0.5).build(SimpleNamespace(reduce=lambda rows, batch: rows.mean()))
    assert all(issubclass(backbone, found["ShortUsers"].fits) for backbone in (GRU4Rec, LightGCN))
    output = StudentOutput(user=torch.tensor([[1.0, 1.0], [2.0, 0.0]]), items=torch.zeros(3, 2))
    assert term(output, {}).item() == (2.0**2 + 4.0**2) / 2
