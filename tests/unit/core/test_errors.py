"""What is told of an error before it has a kind."""

from __future__ import annotations

import pytest
import torch

from simpletuner.core.errors import is_out_of_memory
from tests.runs import fill_the_memory


def test_the_cpus_refusal_is_a_full_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        fill_the_memory()
    assert not isinstance(refused.value, (torch.OutOfMemoryError, MemoryError))
    assert is_out_of_memory(refused.value)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("Allocation on device"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"), True),
        (RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_full_memory_is_told_from_other_errors(error: Exception, full: bool) -> None:
    assert is_out_of_memory(error) == full
