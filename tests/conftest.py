"""What tests of all parts share."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device that a test runs on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; this machine has none")
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
