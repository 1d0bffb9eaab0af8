import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The models are tiny: handing their work to other threads costs more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
