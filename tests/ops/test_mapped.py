"""Weights in a model's file: packed copies of them are made, and their own memory is given back."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewardprop_fast.ops import drop_packs, frozen_conv2d, mapped, packed_bytes

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is given back on Linux alone"
)


@pytest.fixture
def weight(tmp_path: Path) -> Tensor:
    """(256, 256, 3, 3), 2.3 MB, read from a file."""
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.randn(256, 256, 3, 3)}, path)
    return load_file(path)["weight"]


def resident(tensor: Tensor) -> int:
    """Bytes of it in memory, by the system's own account of the mapping."""
    begin, found = tensor.data_ptr(), 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, _, high = head.partition("-")
            inside = int(low, 16) <= begin < int(high, 16)
        elif inside and head == "Rss:":
            found += 1024 * int(line.split()[1])
    return found


def test_knows_what_lies_in_a_file(weight: Tensor) -> None:
    assert mapped.lies_in_a_file(weight.data_ptr(), weight.nbytes)
    copy = weight.clone()
    assert not mapped.lies_in_a_file(copy.data_ptr(), copy.nbytes)


def test_what_is_let_go_comes_back_as_it_was_changes_included(weight: Tensor) -> None:
    weight[3].mul_(2)
    before = weight.clone()
    assert mapped.let_go(weight.data_ptr(), weight.nbytes)
    assert torch.equal(weight, before)


def test_a_packed_weight_gives_its_memory_back(weight: Tensor) -> None:
    x = torch.randn(2, 256, 8, 8).to(memory_format=torch.channels_last)
    expected = frozen_conv2d(x, weight.clone(), None, padding=1)
    total = float(weight.sum())  # all of it has been read
    assert resident(weight) > 0.9 * weight.nbytes
    for _ in range(3):
        assert torch.equal(frozen_conv2d(x, weight, None, padding=1), expected)
    if packed_bytes([weight]) == 0:
        pytest.skip("nothing is packed on this processor")
    assert resident(weight) < 0.5 * weight.nbytes
    assert float(weight.sum()) == total
    # another weight in the same place is seen, also where autograd does not count it
    weight.data.copy_(torch.randn(256, 256, 3, 3))
    changed = frozen_conv2d(x, weight, None, padding=1)
    assert torch.equal(changed, frozen_conv2d(x, weight.clone(), None, padding=1))
    drop_packs([weight])


def test_letting_go_leaves_what_was_written(weight: Tensor) -> None:
    """One number of one page, in the middle: the others' pages are the file's, this one is not."""
    begin, end = (
        weight.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE + mmap.PAGESIZE,
        weight.data_ptr() + weight.nbytes,
    )
    end = end // mmap.PAGESIZE * mmap.PAGESIZE
    float(weight.sum())
    assert mapped._as_in_the_file(begin, end)
    weight.view(-1)[weight.numel() // 2] = 3.0
    assert not mapped._as_in_the_file(begin, end)
    assert mapped.let_go(weight.data_ptr(), weight.nbytes)
    assert weight.view(-1)[weight.numel() // 2] == 3.0


def test_pages_that_nobody_wrote_to_are_gone_at_once(weight: Tensor) -> None:
    total = float(weight.sum())
    assert resident(weight) > 0.9 * weight.nbytes
    assert mapped.let_go(weight.data_ptr(), weight.nbytes)
    assert resident(weight) < 0.1 * weight.nbytes
    assert float(weight.sum()) == total
