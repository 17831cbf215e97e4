"""Prompt sets: shipped, from a file, from a list."""

from __future__ import annotations

import pytest

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.training.prompts import load_prompts, names


def test_every_shipped_set_reads():
    assert {"animals", "bundled"} <= set(names())
    for name in names():
        prompts = load_prompts(name)
        assert len(prompts) == len(set(prompts.prompts)) == len(prompts.metadata) >= 40
        assert all(p == p.strip() and p and not p.startswith("#") for p in prompts.prompts)
    assert "dog" in load_prompts("animals").prompts


def test_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# a comment\n\n  a red apple \r\nein grüner Frosch\n   # not one either\n")
    for source in (path, str(path)):
        prompts = load_prompts(source)
        assert prompts.prompts == ("a red apple", "ein grüner Frosch")
        assert prompts.metadata == ({}, {})


def test_a_list_with_metadata():
    prompts = load_prompts(["a", ("b", {"label": 3})])
    assert prompts.prompts == ("a", "b")
    assert prompts.metadata == ({}, {"label": 3})
    assert len(prompts) == 2


def test_what_is_no_list_of_prompts():
    with pytest.raises(ConfigError, match="empty; give at least one"):
        load_prompts([])
    with pytest.raises(ConfigError, match=r"prompts\[1\] is 3; allowed: a text"):
        load_prompts(["a", 3])
    with pytest.raises(ConfigError, match=r"prompts\[0\] is \('a', 'b'\)"):
        load_prompts([("a", "b")])
    for wrong in (5, None, b"a", {"a": 1}):
        with pytest.raises(ConfigError, match=r"a prompt set's name, a \.txt file, or a list"):
            load_prompts(wrong)


def test_what_is_no_file_of_prompts(tmp_path):
    with pytest.raises(
        ConfigError, match=r"'animal', which is neither a prompt set \(animals, bundled"
    ):
        load_prompts("animal")
    with pytest.raises(ConfigError, match="nor a readable text file"):
        load_prompts(tmp_path)
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n\n")
    with pytest.raises(ConfigError, match="holds no prompts"):
        load_prompts(empty)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="nor a readable text file"):
        load_prompts(binary)
