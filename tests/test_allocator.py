"""Kept memory changes nothing but the time. Blocks of more than 32 MB are what glibc would otherwise always map anew."""

import subprocess
import sys

PROGRAM = """
import resource, sys
from lit_llmers.allocator import keep_memory
kept = sys.argv[1] == "keep" and keep_memory()
import torch
torch.manual_seed(0)
weight = torch.randn(64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    total = (torch.ones(200_000, 64) @ weight).relu().sum()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, total.item().hex())
"""


def test_the_same_numbers_with_fewer_page_faults():
    kept, plain = (
        subprocess.run([sys.executable, "-c", PROGRAM, how], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
        for how in ("keep", "leave")
    )
    assert kept[2] == plain[2]
    if kept[0] == "True":  # there is a glibc
        assert int(kept[1]) < 0.8 * int(plain[1])
