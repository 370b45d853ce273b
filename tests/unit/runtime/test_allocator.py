"""Freed memory stays with the process where the C library is told so."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from simpletuner.runtime.allocator import keep_freed_memory
{call}
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(64 << 18).sum()  # 64 MB, taken and given back
before = faults()
for _ in range(8):
    torch.zeros(64 << 18).sum()
print(faults() - before)
"""


def faults(call: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(call=call)], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_taken_again_without_page_faults():
    assert faults("keep_freed_memory()") * 20 < faults("")
