"""Freed memory stays with the process where the C library is told so."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from simpletuner.runtime.allocator import keep_freed_memory

def work():
    for _ in range(4):
        torch.ones(1 << 24) * 2 + 1  # 64 MB each: more than glibc ever keeps by itself

{call}
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call: str) -> int:
    """Page faults of work that was done once before."""
    command = [sys.executable, "-c", FAULTS.format(call=call)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_taken_again_without_page_faults():
    # Of twelve blocks one may lie elsewhere the second time, as the heap happens to be cut.
    assert faults("keep_freed_memory()") * 6 < faults("")
