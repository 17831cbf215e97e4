"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardprop_fast.memory import format_bytes, parse_bytes
from rewardprop_fast.memory.sizes import UNITS


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("23.5 GiB", 47 * 2**29),
        (" 8 gib ", 8 * 2**30),
        ("512B", 512),
        ("1.5kb", 1500),
        (".5 MiB", 2**19),
        ("2.TiB", 2**41),
        ("9007199254740993 B", 9007199254740993),  # 2^53 + 1
        ("0.1 KiB", 102),
        (0, 0),
        (12345, 12345),
    ],
)
def test_sizes(written: int | str, nbytes: int) -> None:
    assert parse_bytes(written) == nbytes


@pytest.mark.parametrize(
    "written",
    ["24 gigs", "24", "GiB", "", "-3GiB", "1e3 GiB", "1,5 GiB", "nan GiB", "24 G", -1, True, 2.5],
)
def test_what_is_no_size_is_refused_in_words(written: object) -> None:
    with pytest.raises(ValueError, match="is no size; write a number and a unit") as error:
        parse_bytes(written)  # type: ignore[arg-type]
    assert repr(written) in str(error.value)
    assert "'23.5 GiB'" in str(error.value)


@pytest.mark.parametrize(
    ("nbytes", "written"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (47 * 2**29, "23.50 GiB"),
        (2**40, "1.00 TiB"),
        (-(2**21), "-2.00 MiB"),
    ],
)
def test_format(nbytes: int, written: str) -> None:
    assert format_bytes(nbytes) == written


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**44))
def test_what_is_written_can_be_read(nbytes: int) -> None:
    """To the two decimals that are shown."""
    written = format_bytes(nbytes)
    assert abs(parse_bytes(written) - nbytes) <= 0.005 * UNITS[written.split()[1]] + 1


def test_a_size_to_be_asked_for_is_never_rounded_down() -> None:
    for nbytes in (2**30 + 1, 10737418240 + 5, 3 * 2**20 + 7, 2**40 * 5 + 3):
        assert parse_bytes(format_bytes(nbytes, up=True)) >= nbytes
    assert format_bytes(2**30 + 1, up=True) == "1.01 GiB"
    assert format_bytes(3 * 2**30, up=True) == "3.00 GiB"
