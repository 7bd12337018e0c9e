"""Every strategy trains the same model: two processes under ddp, ZeRO and FSDP2 against one.

One start of two processes (`strategies.py`) does all runs; the tests look at what these left.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny import assert_equal_weights, losses, weights

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'lit-llmers[deepspeed]'")

import strategies as runs

from lit_llmers.callbacks.resume import LastCheckpoint
from lit_llmers.errors import UserError
from lit_llmers.models import build_model, load_dataset
from lit_llmers.running import run

WORDS = "Here is what a user chose so far oldest first Tell which item the will choose next Instruction Input Response"


def save_base(folder: Path) -> None:
    """A tiny Llama and its tokenizer, as a user's local folder holds them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *sorted(set(WORDS.split()))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(
        folder
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=len(words), initializer_range=0.2, num_key_value_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    """Two processes; the output of both."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    return subprocess.run(start, env=environment, text=True, timeout=600, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of all runs."""
    root = tmp_path_factory.mktemp("strategies")
    save_base(root / "base")
    for case, settings in runs.CASES.items():
        run(list(runs.stages(root, case).values()), settings["stage"])
    for case, strategy, again in runs.RUNS:
        stage, done = runs.stage_of(root, case, strategy, again), runs.stage_of(root, case)
        stage.folder.mkdir(parents=True)
        for need, before in zip(stage.needs, done.needs, strict=True):
            need.folder.symlink_to(before.folder)
    ended = torchrun(str(Path(runs.__file__)), str(root))
    assert ended.returncode == 0, ended.stdout[-40000:]
    return root


def summary(stage):
    return json.loads((stage.folder / "summary.json").read_text())


@pytest.mark.parametrize(("case", "strategy", "again"), runs.RUNS)
def test_it_is_the_training_of_one_process(root, case, strategy, again):
    """`lora` was stopped within a validation, killed inside an epoch, and begun again each time."""
    ours, one = runs.stage_of(root, case, strategy, again), runs.stage_of(root, case)
    assert ours.fingerprint == one.fingerprint
    values, expected = losses(ours, "loss"), losses(one, "loss")
    assert len(expected) >= {"lora": 6, "said": 10, "said-lora": 10}.get(case, 20)
    torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), rtol=0, atol=1e-4)
    for name in ("epochs", "parameters", "best"):
        assert summary(ours)[name] == pytest.approx(one.summary[name], abs=1e-4), name


@pytest.mark.parametrize(("case", "strategy", "again"), runs.RUNS)
def test_what_is_saved_is_what_one_process_saves(root, case, strategy, again):
    """Put together, without what is frozen, in no other format; but for numbers whose gradient is nothing but rounding."""
    ours, one = weights(runs.stage_of(root, case, strategy, again)), weights(runs.stage_of(root, case))
    assert ours.keys() == one.keys()
    for name, value in one.items():
        assert ours[name].dtype == value.dtype
        rounding = name.endswith("qkv.bias")  # softmax does not see what is added to all keys
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-2 if rounding else 2e-4, msg=name)


@pytest.mark.parametrize("strategy", [*runs.EVERY, "zero3-offload"])
def test_every_weight_starts_as_on_one_process(root, strategy):
    stage = runs.stage_of(root, "full", strategy)
    L.seed_everything(stage.seed, verbose=False)
    expected = build_model(stage, load_dataset(stage)).state_dict()
    assert_equal_weights(torch.load(stage.folder / "initial.pt"), expected)
    embedded = [value for name, value in expected.items() if "q_proj" in name]
    assert all(0.01 < value.std() < 0.1 for value in embedded), "the base's own way to start, not torch's"


@pytest.mark.parametrize("case", ["full", "lora"])
@pytest.mark.parametrize("strategy", runs.EVERY)
def test_what_each_process_holds_of_the_base(root, case, strategy):
    stage = runs.stage_of(root, case, strategy, case == "lora")
    shares = [json.loads((stage.folder / f"share-{rank}.json").read_text()) for rank in (0, 1)]
    assert shares == pytest.approx([1, 1] if strategy in ("ddp", "zero2") else [0.5, 0.5], abs=0.02)


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_plain_peft_loads_the_adapter(root, strategy):
    """Without anything of ours, to the logits of one process."""
    import peft
    from transformers import AutoModelForCausalLM

    tokens, logits = torch.tensor([[5, 6, 7, 8]]), []
    for stage in (runs.stage_of(root, "said-lora", strategy), runs.stage_of(root, "said-lora")):
        folder = stage.folder / "model"
        plain = AutoModelForCausalLM.from_pretrained(folder / "base")
        before = plain(input_ids=tokens).logits.detach()
        adapted = peft.PeftModel.from_pretrained(plain, folder).eval()
        assert all(parameter.numel() for parameter in adapted.parameters())
        logits.append(adapted(input_ids=tokens).logits.detach())
        assert (logits[-1] - before).abs().max() > 1e-3
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", runs.EVERY)
def test_it_goes_on_from_a_checkpoint_of_its_own_kind_alone(root, strategy):
    stage = runs.stage_of(root, "lora", strategy, True)
    path = stage.folder / "last.ckpt"
    assert path.is_file() == (strategy == "ddp")
    for other in runs.EVERY:
        last = LastCheckpoint(path, stage.fingerprint, runs.stage_of(root, "lora", other).config.trainer)
        if other == strategy:
            assert last.found() == str(path)
        else:
            with pytest.raises(UserError, match=f"trainer.strategy={strategy} on 2 processes"):
                last.found()


def test_nothing_half_written_is_left(root):
    assert not [path for path in root.rglob("*") if path.name.endswith((".tmp", ".previous"))]
