"""A base in half precision that is trained as a whole: what moves, what is kept, and what serves."""

import lightning as L
import pytest
import torch
from tiny import by_name, small, weights

from lit_llmers.callbacks.float32 import HALVES, TrainInFloat32
from lit_llmers.conf.schema import TrainerConfig
from lit_llmers.models import build_model, load_dataset, load_model
from lit_llmers.running import run

SMALL_STEPS = ["optimizer.lr=2.0e-5", "optimizer.weight_decay=0", "trainer.max_epochs=1"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_every_weight_of_a_base_in_half_precision_moves_and_is_kept_in_float32(tmp_path, precision):
    planned = small(tmp_path, "teacher.dtype=bfloat16", f"trainer.precision={precision}", *SMALL_STEPS)
    run(planned, "teacher")
    stage = by_name(planned)["teacher"]
    dataset = load_dataset(stage)
    L.seed_everything(stage.seed, verbose=False)
    start, trained, served = build_model(stage, dataset).state_dict(), weights(stage), load_model(stage, dataset)
    own = [name for name in trained if ".base." in name]
    assert {trained[name].dtype for name in own} == {torch.float32}
    moved = {name: (trained[name] != start[name].float()).float().mean().item() for name in own}
    assert len(moved) == 4 * 9 + 1, "four layers of seven matrices and two norms, and the last norm"
    assert min(moved.values()) > 0.9
    assert served.backbone.base.dtype == start[own[0]].dtype == torch.bfloat16
    assert torch.equal(served.state_dict()[own[0]], trained[own[0]].bfloat16())


class Frozen(L.LightningModule):
    """One layer that trains, one that does not."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.trained, self.frozen = (torch.nn.Linear(2, 2, dtype=dtype) for _ in range(2))
        self.frozen.requires_grad_(False)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_what_is_frozen_keeps_its_type_and_what_trains_gets_it_back(dtype):
    module, callback = Frozen(dtype), TrainInFloat32()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback.setup(L.Trainer(logger=False, enable_checkpointing=False), module, "fit")
    assert module.trained.weight.dtype == module.trained.bias.dtype == (torch.float32 if dtype in HALVES else dtype)
    assert module.frozen.weight.dtype == dtype
    callback.teardown(L.Trainer(logger=False, enable_checkpointing=False), module, "fit")
    assert all(torch.equal(value, before[name]) and value.dtype == dtype for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("strategy", "precision", "expected"),
    [
        ("auto", "32-true", True),
        ("ddp", "bf16-mixed", True),
        ("fsdp2", "bf16-mixed", True),
        ("auto", "bf16-true", False),
        ("zero2", "bf16-mixed", False),
        ("zero3", "bf16-mixed", False),
    ],
)
def test_deepspeed_has_its_own_and_half_throughout_is_as_asked(strategy, precision, expected):
    assert TrainerConfig(strategy=strategy, precision=precision).trains_in_float32 is expected
