"""What all unit tests share."""

import random
import sys

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begin alike, whichever tests ran before in this process: that varies over workers."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(0)
        # A training inside this process leaves them on.
        torch.use_deterministic_algorithms(False)
