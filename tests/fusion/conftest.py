import pytest
import torch


@pytest.fixture
def double():
    """New tensors are of float64, as the golden numbers are."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
