import pytest
import torch
from official import Whole, assert_gradient, assert_value
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llmers.backbones.sasrec import SASRec
from lit_llmers.errors import UserError
from lit_llmers.fusion.add_projected import AddProjected


def with_golden_weights(z: dict[str, Tensor]) -> tuple[AddProjected, Tensor]:
    """The model and histories as ours are numbered: theirs from 0, with padding n."""
    n_items, text = int(z["hp.n_items"]), z["in.llm_item_emb"]
    model = AddProjected(Whole(n_items, int(z["hp.hidden"])), F.pad(text, (0, 0, 1, 0)), float(z["hp.ed_weight"]))
    with torch.no_grad():
        model.inner.items.weight.copy_(F.pad(z["param.item_embeddings.weight"][:-1], (0, 0, 1, 0)))
        model.text.adapter.weight.copy_(z["param.fc_4096_64.weight"])
        model.text.adapter.bias.copy_(z["param.fc_4096_64.bias"])
    return model, (z["in.seq"] + 1) % (n_items + 1)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("student", ["gru", "sasrec", "caser"])
def test_official_inputs(golden, student):
    z = golden(f"dllm2rec/case_a_student_{student}")
    model, items = with_golden_weights(z)
    x = model.embed(items)
    assert_value(x[items > 0], z["out.fused_input"][items > 0])
    assert not x[items == 0].any()
    assert torch.equal(model.item_table(), model.inner.item_table())
    with torch.no_grad():  # then the projection of all items is made, here that of the items of the batch alone
        assert_value(model.embed(items), x)


@pytest.mark.usefixtures("double")
def test_official_gradients_through_a_gru(golden):
    z = golden("dllm2rec/case_a_student_gru")
    model, items = with_golden_weights(z)
    gru, output = nn.GRU(8, 8, batch_first=True), nn.Linear(8, int(z["hp.n_items"]))
    gru.load_state_dict({name: z[f"param.gru.{name}"] for name in gru.state_dict()})
    output.load_state_dict({name: z[f"param.s_fc.{name}"] for name in output.state_dict()})
    states, _ = gru(model.embed(items))
    logits = output(states[torch.arange(len(items)), z["in.len_seq"] - 1])
    assert_value(logits, z["out.logits"])
    (logits * z["in.upstream"]).sum().backward()
    for kind in ("weight", "bias"):
        assert_gradient(getattr(model.text.adapter, kind), z[f"grad.param.fc_4096_64.{kind}"])
    torch.testing.assert_close(model.inner.items.weight.grad[1:], z["grad.param.item_embeddings.weight"][:-1])


@pytest.mark.parametrize("epsilon", [-1.0, float("nan")])
def test_a_weight_of_the_text_below_zero_or_none(epsilon):
    with pytest.raises(UserError, match=f"epsilon is {epsilon}. It must be 0"):
        AddProjected(SASRec(10, 5, dim=8), torch.randn(11, 6), epsilon)
