"""The fixture that keeps tests small can fail."""

import pytest
from footprint import Small, peak


def test_a_block_that_needs_too_much_fails():
    limit = peak() + 32 * 2**20
    with pytest.raises(AssertionError, match="GB, of at most"), Small(limit):
        bytearray(256 * 2**20)[::4096] = b"x" * (256 * 2**8)  # each page is touched, and given back
    with Small(limit):  # those that come after aren't blamed
        bytearray(2**20)


def test_its_own_failure_comes_first():
    with pytest.raises(ZeroDivisionError), Small():
        raise ZeroDivisionError
