"""Fixtures shared by all tests: the ISA, the thread count, the seed."""

import pytest
import torch

import fastlm


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(0)


@pytest.fixture(params=fastlm._C.isas())
def isa(request):
    """Runs the test on every instruction set that this machine has."""
    before = fastlm._C.isa()
    fastlm._C.set_isa(request.param)
    yield request.param
    fastlm._C.set_isa(before)


@pytest.fixture
def restore_threads():
    """Lets a test call torch.set_num_threads; the count is put back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=(1, 2, 3), ids="threads{}".format)
def threads(request, restore_threads):
    """Runs the test with each of these thread counts."""
    torch.set_num_threads(request.param)
    return request.param
