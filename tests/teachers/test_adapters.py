"""Fine-tuning an LLM decoder: LoRA, full, gradient checkpointing."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_llmers.backbones.llm_decoder import LLMDecoder
from lit_llmers.errors import UserError
from lit_llmers.teachers.base import BaseConfig, load_causal
from lit_llmers.teachers.language_model import save_language_model
from lit_llmers.teachers.lora import LoraConfig, with_lora

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0}
ITEMS = torch.tensor([[0, 0, 3, 4, 5], [1, 2, 3, 4, 5], [0, 0, 0, 0, 9]])


def build(path, train_items=False, **settings) -> LLMDecoder:
    torch.manual_seed(0)
    base = {"name": "tiny", "path": str(path)} | settings
    return LLMDecoder(torch.randn(11, 8), 20, base, layers=3, train_items=train_items)


def user(model: LLMDecoder) -> torch.Tensor:
    return model.head(model(ITEMS, ITEMS > 0)[-1])


def test_lora_changes_nothing_before_the_first_step(folder):
    plain, adapted = build(folder), build(folder, lora=LORA)
    adapted.input_proj.load_state_dict(plain.input_proj.state_dict())
    adapted.score.load_state_dict(plain.score.state_dict())
    assert torch.equal(user(plain), user(adapted))


def test_lora_trains_adapters_and_projections_alone(llama):
    model = build(llama, lora=LORA, prompt=True)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if "lora_" not in name} == {
        "input_proj.weight",
        "input_proj.bias",
        "score.weight",
    }
    adapters = {name for name in trainable if "lora_" in name}
    assert len(adapters) == 3 * 3 * 2  # layers x targets x (A, B)
    assert all(any(target in name for target in ("gate_proj", "up_proj", "down_proj")) for name in adapters)

    frozen = {name: value.clone() for name, value in model.state_dict().items() if name not in trainable}
    before = user(model).detach()
    sgd = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(2):  # in the first step A has no gradient: B is zero
        sgd.zero_grad()
        user(model).square().sum().backward()
        sgd.step()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if name in trainable)
    assert (user(model) - before).abs().max() > 1e-3


def test_adapters_of_a_bfloat16_base_are_float32(llama):
    model = build(llama, lora=LORA, dtype="bfloat16")
    dtypes = {("lora_" in name, parameter.dtype) for name, parameter in model.base.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert torch.isfinite(user(model)).all()
    assert user(model).dtype == torch.float32


def test_a_target_that_the_base_lacks_is_named(llama):
    with pytest.raises(UserError, match=r"\['c_fc'\].*down_proj, gate_proj"):
        build(llama, lora=LORA | {"targets": ["c_fc", "up_proj"]})


def test_without_lora_all_trains_but_the_item_table(llama):
    model = build(llama, prompt=True)
    user(model).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert "items" not in model.state_dict()
    assert not any("embed_tokens" in name for name in model.state_dict())

    trained = build(llama, train_items=True)
    user(trained).square().sum().backward()
    assert trained.items.grad[[3, 4, 5, 9]].any(1).all()
    assert not trained.items.grad[[0, 6, 7, 8, 10]].any()


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_gives_the_same_gradients(folder, lora):
    gradients = []
    for checkpointing in (False, True):
        model = build(folder, lora=lora, gradient_checkpointing=checkpointing).train()
        recomputed = []
        model.base.layers[1].self_attn.register_forward_hook(lambda *_, calls=recomputed: calls.append(1))
        states = model(ITEMS, ITEMS > 0)
        sum(state.square().mean() for state in states[1:]).backward()
        assert len(recomputed) == 1 + checkpointing
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert all(torch.allclose(plain[name], recomputed[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("kind", ["from scratch", "in a folder"])
def test_a_tuned_adapter_finds_its_base_whatever_folder_one_stands_in(llama, tmp_path, monkeypatch, kind):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    (tmp_path / "llama").symlink_to(llama)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    given = {"path": "llama"} if kind == "in a folder" else {"config": sizes}
    base = BaseConfig("tiny", lora=LoraConfig(rank=2, targets=("gate_proj",)), **given)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = with_lora(load_causal(base, tokenizer), base.lora)
    stage, wording = SimpleNamespace(config=SimpleNamespace(base=base), seed=0), SimpleNamespace(tokenizer=tokenizer)
    save_language_model(stage, model, wording, Path("runs/model"))
    monkeypatch.chdir("elsewhere")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "runs" / "model", local_files_only=True)
    tokens = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again.eval()(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)
