import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from lit_llmers.errors import UserError
from lit_llmers.teachers.base import BaseConfig, load_base, load_causal, load_tokenizer

TEACHERS = sorted((Path(__file__).parents[2] / "lit_llmers/conf/teacher").glob("*.yaml"))
TINY = {"vocab_size": 3, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 4}


def config(**settings) -> BaseConfig:
    return BaseConfig.of({"name": "tiny"} | settings)


@pytest.mark.parametrize("path", TEACHERS, ids=lambda path: path.stem)
def test_shipped_teachers_name_every_setting(path):
    settings = yaml.safe_load(path.read_text())
    assert list(settings) == list(BaseConfig.__dataclass_fields__)
    assert BaseConfig.of(settings).name == path.stem


def test_the_first_layers_of_a_local_folder_are_the_base_s_own(folder):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(folder).model.eval()
    first, _ = load_base(config(path=str(folder)), layers=2)
    first.eval()
    assert len(first.layers) == 2
    assert not any("lm_head" in name for name, _ in first.named_parameters())

    vectors = torch.randn(3, 6, 32)
    expected = whole(inputs_embeds=vectors, output_hidden_states=True).hidden_states
    states = first(inputs_embeds=vectors, output_hidden_states=True).hidden_states
    assert len(states) == 3
    torch.testing.assert_close(states[1], expected[1])
    torch.testing.assert_close(states[2], whole.norm(expected[2]))  # the last one has been through the final norm
    assert (states[2] - expected[2]).abs().max() > 0.1


def test_a_base_from_scratch_starts_the_same_at_any_depth():
    deep, tokenizer = load_base(config(config=TINY), layers=4)
    torch.manual_seed(123)
    shallow, _ = load_base(config(config=TINY), layers=2)
    assert tokenizer is None
    assert shallow.config.num_hidden_layers == len(shallow.layers) == 2
    for left, right in zip(shallow.layers, deep.layers, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))
    other, _ = load_base(config(config=TINY, seed=1), layers=2)
    assert not torch.equal(other.layers[0].mlp.up_proj.weight, shallow.layers[0].mlp.up_proj.weight)


def test_building_a_base_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load_base(config(config=TINY), layers=2)
    assert torch.equal(torch.rand(1), expected)


def test_dtype(folder):
    for settings in ({"path": str(folder)}, {"config": TINY}):
        model, _ = load_base(config(dtype="bfloat16", **settings), layers=1)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_teacher_deeper_than_its_base_is_refused(llama):
    for settings in ({"path": str(llama)}, {"config": TINY}):
        with pytest.raises(UserError, match=r"8 layers .*'tiny', which has 4"):
            load_base(config(**settings), layers=8)


@pytest.mark.parametrize("path", ["nobody/nothing", "not a name"])
def test_a_base_that_cannot_be_had_is_named_with_the_cure(path):
    with pytest.raises(UserError, match=rf"'{path}' cannot be loaded.*teacher=local teacher.path=FOLDER"):
        load_base(config(path=path), layers=1)


@pytest.mark.parametrize("path", ["/no/such/folder", "./no/such/folder", "../nothing", "~/no such folder"])
def test_a_folder_that_is_not_there_is_refused_before_it_is_loaded(path):
    with pytest.raises(UserError, match=r"There is no folder \S.*, the base 'tiny' \(teacher\.path\)\. Correct it"):
        config(path=path)


def test_the_home_folder_may_be_written_short(llama, monkeypatch):
    monkeypatch.setenv("HOME", str(llama.parent))
    assert config(path=f"~/{llama.name}").path == str(llama)


def test_a_folder_with_missing_weights_is_refused(llama, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors.*layers\.0\.mlp\.up_proj\.weight"):
        load_base(config(path=str(broken)), layers=2)


def test_truncated_weights_are_named(llama, tmp_path):
    import shutil

    folder = shutil.copytree(llama, tmp_path / "base")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    settings = config(path=str(folder))
    for load in (lambda: load_base(settings, layers=2), lambda: load_causal(settings, load_tokenizer(settings))):
        with pytest.raises(UserError, match=f"weights of the base '{folder}' are damaged.*Fetch the files again"):
            load()


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_an_attention_that_is_not_installed_is_named(llama):
    for settings in (
        config(path=str(llama), attention="flash_attention_2"),
        config(config=TINY, attention="flash_attention_2"),
    ):
        with pytest.raises(UserError, match="The base '.*' needs a package that is not installed.*set attention to sdpa"):
            load_base(settings, layers=1)
    with pytest.raises(UserError, match="Unknown teacher.attention 'sdpaa'. Did you mean 'sdpa'"):
        config(config=TINY, attention="sdpaa")


def test_a_folder_without_tokenizer_has_none(llama, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(llama, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    assert load_base(config(path=str(bare), prompt=True), layers=1)[1] is None
    assert load_base(config(path=str(llama), prompt=True), layers=1)[1] is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pth": "x"}, "teacher.pth.*'path'"),
        ({"lora": {"rnk": 4}}, "teacher.lora.rnk.*'rank'"),
        ({"dtype": "bfloat"}, "teacher.dtype 'bfloat'.*'bfloat16'"),
        ({"examples": "prefix"}, "'prefix'.*'prefixes'"),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest(settings, message):
    with pytest.raises(UserError, match=message):
        config(**settings)


def test_an_unknown_architecture_is_named():
    with pytest.raises(UserError, match=r"teacher\.config of 'tiny'"):
        load_base(config(config={"model_type": "llamma"}), layers=1)


# ---- with the language-model head ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_causal_language_model_is_the_whole_base_without_its_habits(folder, tmp_path, dtype):
    import shutil

    from transformers import AutoModelForCausalLM, GenerationConfig

    settings = config(path=str(shutil.copytree(folder, tmp_path / "base")), dtype=dtype)
    GenerationConfig(do_sample=True, top_p=0.5, repetition_penalty=9.0).save_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(settings)
    model = load_causal(settings, tokenizer).eval()
    tokens = torch.tensor([[5, 6, 7]])
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    assert torch.equal(model(input_ids=tokens).logits, whole(input_ids=tokens).logits)
    assert model.generation_config.repetition_penalty is None
    assert not model.generation_config.do_sample
    said = model.generate(tokens, max_new_tokens=5, do_sample=False)
    greedy = tokens
    for _ in range(5):
        greedy = torch.cat([greedy, whole(input_ids=greedy).logits[:, -1:].argmax(-1)], 1)
    if dtype == "float32" and tokenizer.eos_token_id not in greedy:
        assert torch.equal(said, greedy)


def test_a_language_model_from_scratch_has_the_tokenizers_vocabulary(llama):
    tokenizer = load_tokenizer(config(path=str(llama)))
    assert load_tokenizer(config(config=TINY)) is None
    model, again = (load_causal(config(config=TINY, seed=3), tokenizer) for _ in range(2))
    assert model.get_output_embeddings().out_features == len(tokenizer) != TINY["vocab_size"]
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_token_of_the_tokenizer_alone_may_pad_and_nothing_else(llama, tmp_path):
    import shutil

    folder = shutil.copytree(llama, tmp_path / "base")
    settings = config(path=str(folder), prompt=True)
    load_tokenizer(settings).save_pretrained(folder)
    tokenizer = load_tokenizer(settings)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    load_causal(settings, load_tokenizer(settings))
    load_base(settings, layers=1)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    for load in (lambda: load_causal(settings, load_tokenizer(settings)), lambda: load_base(settings, layers=1)):
        with pytest.raises(UserError, match=rf"tokenizer of the base '{folder}' knows {len(tokenizer)} tokens, but the model"):
            load()


def test_a_base_without_tokenizer_cannot_read(llama, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(llama, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(config(path=str(bare)))
