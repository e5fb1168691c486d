"""Recognition of errors that mean that memory is exhausted."""
import pytest

from model.oom import halve_batch


@pytest.mark.parametrize("said", [
    "CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
    "CUDA driver error: out of memory",
    "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'", "Cannot allocate memory (12)",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"])
def test_errors_that_mean_that_memory_is_exhausted(said, capsys):
    assert halve_batch(8, "tokens", RuntimeError(said)) == 4
    assert "out of memory with 8 tokens at once: trying again with 4" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        halve_batch(8, "tokens", RuntimeError("CUDA error: an illegal memory access was encountered"))
