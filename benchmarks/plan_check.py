"""Does a stage take the memory that its plan says? `python benchmarks/plan_check.py [--only NAME ...] [--record FILE]`.

Each configuration is planned, and trained for an epoch of a few steps with its validation in a process of its own, on the GPU
where there is one. Measured is what the process takes beyond what it took when all was imported and the data were prepared:
on a GPU `torch.cuda.max_memory_allocated`, on a CPU the peak of its resident memory, where the C library is told to give back
at once what is freed: else its gaps are measured too. Rows are as long as they may be, so that every batch is as large as the
plan takes it to be.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from measure import rewrite_section, when

from lit_llmers import recipes
from lit_llmers.environment import environment

GIB = 2**30
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
FULL_ROWS = ["data.generator.shortest=54", "data.generator.mean_length=56", "data.generator.longest=60"]
DATA = [*FULL_ROWS, "logger=csv", "trainer.max_epochs=1", "trainer.accelerator=auto"]
SASREC = "stages.student.model={dim:256,layers:4,heads:4,dropout:0.2,ffn:4,init_std:0.1}"
LARGE = ["data.generator.users=600", "data.generator.items=20000"]
BASE = (
    "teacher.config={{model_type:llama,vocab_size:3,hidden_size:{0},intermediate_size:{1},num_hidden_layers:{2},"
    "num_attention_heads:8,num_key_value_heads:8,max_position_embeddings:1024}}"
)
DECODER = [*["data.generator.users=400", "data.generator.items=2000"], "stages.teacher.items=[item_embeddings]"]
LORA = "teacher.lora={rank:16,alpha:16,dropout:0.05,targets:[gate_proj,up_proj,down_proj]}"
RECOMPUTED = "teacher.gradient_checkpointing=true"
D256 = [*DECODER, BASE.format(256, 1024, 8), "stages.teacher.model.layers=8"]
D768 = [*DECODER, BASE.format(768, 3072, 12), "stages.teacher.model.layers=12"]
CHECKS: dict[str, tuple[str, str, list[str]]] = {  # name -> recipe, stage, overrides
    "sasrec d=256, 4 layers, 128 rows": ("student", "student", [*LARGE, SASREC, "trainer.batch_size=128"]),
    "sasrec d=256, 4 layers, 256 rows": ("student", "student", [*LARGE, SASREC, "trainer.batch_size=256"]),
    "llm d=256, 8 layers, all trained, 64 rows": ("slmrec", "teacher", [*D256, "trainer.batch_size=64"]),
    "llm d=256, 8 layers, all trained, 128 rows": ("slmrec", "teacher", [*D256, "trainer.batch_size=128"]),
    "llm d=256, 8 layers, all trained, 128 rows, recomputed": (
        "slmrec",
        "teacher",
        [*D256, RECOMPUTED, "trainer.batch_size=128"],
    ),
    "llm d=256, 8 layers, LoRA, 128 rows": ("slmrec", "teacher", [*D256, LORA, "trainer.batch_size=128"]),
    "llm d=256, 8 layers, LoRA, 128 rows, recomputed": (
        "slmrec",
        "teacher",
        [*D256, LORA, RECOMPUTED, "trainer.batch_size=128"],
    ),
    "llm d=768, 12 layers, all trained, 32 rows": ("slmrec", "teacher", [*D768, "trainer.batch_size=32"]),
    "llm d=768, 12 layers, LoRA, 32 rows, recomputed": (
        "slmrec",
        "teacher",
        [*D768, LORA, RECOMPUTED, "trainer.batch_size=32"],
    ),
}


class Trained(Exception):
    """The stage has trained, and would read its best epoch back: a second model, which is not looked at."""


def main() -> None:
    """Check each configuration, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="configurations whose name has one of these")
    parser.add_argument("--record", metavar="FILE", help="Markdown file to write the table to")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, name, folder = options.child
        print(json.dumps(planned(name, folder) if what == "plan" else measured(name, folder)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in CHECKS:
            if not options.only or any(text in name for text in options.only):
                print(name, file=sys.stderr)
                rows.append((name, child("plan", name, folder), child("measure", name, folder)))
    text = table(rows)
    print(text)
    if options.record:
        machine = environment()
        place = "a GPU" if rows[0][2]["gpu"] else "a CPU"
        body = f"{when(machine)} `python benchmarks/plan_check.py`.\n\n{text}"
        rewrite_section(Path(options.record), f"Planned and measured memory on {place}, {rows[0][2]['device']}", body)


def child(what: str, name: str, folder: str) -> dict[str, Any]:
    """What a process of its own says; its messages are passed on."""
    command = [sys.executable, __file__, "--child", what, name, folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1])


def stages_of(name: str, folder: str) -> tuple[list[Any], Any]:
    """All stages of a configuration, and the one that is checked."""
    from lit_llmers.composing.resolving import resolve

    recipe, wanted, overrides = CHECKS[name]
    planned = resolve(recipes.compose(recipe, [*DATA, *overrides, f"run.dir={folder}", "trainer.patience=0"]))
    return planned, next(stage for stage in planned if stage.name == wanted)


def planned(name: str, folder: str) -> dict[str, Any]:
    """The memory that the stage's plan says, in bytes."""
    import torch

    from lit_llmers.planning.cards import card
    from lit_llmers.planning.data import known_data
    from lit_llmers.planning.estimate import Estimator
    from lit_llmers.planning.rehearsal import pretending

    stages, stage = stages_of(name, folder)
    known = known_data(stages[0], None)
    assert known is not None
    with pretending(accelerated=torch.cuda.is_available()):
        estimator = Estimator(known, card("h100-80gb"), 0.4)
        found = estimator(stage)
    if found.memory is None:
        sys.exit(f"{name}: {found.notes}")
    return found.memory


def measured(name: str, folder: str) -> dict[str, Any]:
    """The memory that the stage takes, in bytes."""
    import torch
    from fits import quiet

    from lit_llmers import training
    from lit_llmers.running import run

    quiet()
    planned, stage = stages_of(name, folder)
    first = [each for each in planned if each.name in ("prepare", "item_embeddings")]
    few = [*first[:1], *(each for each in first[1:] if stage.name == "teacher")]
    run([each for each in few if not each.done], None)
    on_gpu = torch.cuda.is_available()
    gc.collect()
    warm_up()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else resident(reset=True)
    with patch.object(training, "load_model", side_effect=Trained), suppress(Trained):
        training.run(stage)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident(peak=True)
    device = torch.cuda.get_device_name() if on_gpu else environment()["cpu"]
    return {"bytes": peak - before, "gpu": on_gpu, "device": device}


def warm_up() -> None:
    """What PyTorch allocates once, for its threads and kernels, is no part of a model."""
    import torch

    x = torch.randn(64, 64, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]).sum().backward()


def resident(peak: bool = False, reset: bool = False) -> int:
    """Resident memory of this process, or its peak since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def table(rows: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> str:
    """A Markdown table, one configuration in a row."""
    lines = [
        "| training | weights, gradients, AdamW | activations | planned peak | measured peak | planned / measured |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, plan, found in rows:
        held = plan["weights"] + plan["gradients"] + plan["optimizer"]
        sizes = (held, plan["activations"], plan["peak"], found["bytes"])
        cells = " | ".join(f"{size / GIB:.2f} GiB" for size in sizes)
        lines.append(f"| {name} | {cells} | {plan['peak'] / found['bytes']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
