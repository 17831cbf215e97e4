"""The list of deliberate faults fits the sources; `python -m tools.mutations` runs it."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path

import pytest

from rewardprop_fast import ops
from tools import mutations
from tools.mutations import Fault

FAULTS = mutations.faults()


def test_every_form_has_a_fault_in_each_pass() -> None:
    there = {(fault.operator, fault.form, fault.phase) for fault in FAULTS}
    missing = [
        (name, form.backend, phase)
        for name, operator in ops.OPERATORS.items()
        for form in operator.implementations
        for phase in ("forward", "backward")
        if (name, form.backend, phase) not in there
    ]
    assert not missing
    assert {fault.operator for fault in FAULTS} == set(ops.OPERATORS)
    assert {fault.phase for fault in FAULTS} == {"forward", "backward"}
    assert [name for name, count in Counter(f.name for f in FAULTS).items() if count > 1] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_its_file_and_names_tests(fault: Fault, tmp_path: Path) -> None:
    copy = tmp_path / fault.file
    copy.parent.mkdir(parents=True)
    copy.write_text((mutations.ROOT / fault.file).read_text(encoding="utf-8"), encoding="utf-8")
    whole = fault.put_into(tmp_path)
    assert copy.read_text(encoding="utf-8") != whole
    named = shlex.split(fault.tests)[0]
    assert (mutations.ROOT / named).is_file()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A right sum, a test that looks at one of its sides, and one that looks at nothing."""
    (tmp_path / "added.py").write_text("def added(a, b):\n    return a + b\n")
    (tmp_path / "test_one.py").write_text(
        "from added import added\n\ndef test_it():\n    assert added(1, 0) == 1\n"
    )
    (tmp_path / "test_none.py").write_text("import added\n\ndef test_it():\n    pass\n")
    return tmp_path


def fault(after: str, tests: str, before: str = "a + b") -> Fault:
    return Fault("sum", "reference", "forward", "wrong", "added.py", before, after, tests)


@pytest.mark.parametrize(
    ("after", "tests", "caught"),
    [
        ("b", "test_one.py", True),
        ("a - b", "test_one.py", False),
        ("b", "test_none.py", False),
        ("b", "test_none.py -k nothing_of_this_name", False),  # no test ran
        ("b", "test_missing.py", False),
    ],
)
def test_a_fault_counts_as_caught_where_a_test_fails(
    tree: Path, after: str, tests: str, caught: bool
) -> None:
    before = (tree / "added.py").read_text()
    outcome = mutations.run(fault(after, tests), tree)
    assert outcome.caught == caught, outcome.words
    assert (tree / "added.py").read_text() == before


def test_a_test_that_fails_without_a_fault_does_not_catch_one(tree: Path) -> None:
    (tree / "test_two.py").write_text(
        "from added import added\n\ndef test_never():\n    assert False\n\n"
        "def test_it():\n    assert added(0, 1) == 1\n"
    )
    known = mutations.failing("test_two.py", tree)
    assert known == ["test_two.py::test_never"]
    missed = mutations.run(fault("b", "test_two.py"), tree, known)
    assert not missed.caught, missed.words
    found = mutations.run(fault("a", "test_two.py"), tree, known)
    assert (found.caught, found.words) == (True, "test_two.py::test_it")


def test_a_fault_that_does_not_fit_is_an_error(tree: Path) -> None:
    with pytest.raises(ValueError, match="stands 0 times"):
        mutations.run(fault("b", "test_one.py", before="a * b"), tree)
