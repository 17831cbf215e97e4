"""The benchmark of the operators on a CPU, on small cases."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import check_cases
from benchmarks.ops import __main__ as command
from benchmarks.ops.measure import OURS
from rewardprop_fast import ops


def test_writes_times_and_bytes_of_every_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_of_each = list({case.operator: case for case in check_cases()}.values())
    monkeypatch.setattr(command, "NETWORKS", (("toy", 64, 1),))
    monkeypatch.setattr(command, "layer_cases", lambda *_: one_of_each)
    output = tmp_path / "ops"
    monkeypatch.setattr(
        "sys.argv", ["ops", "--rounds", "1", "--no-compile", "--output", str(output)]
    )
    command.main()
    with output.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["operator"] for row in rows} == set(ops.OPERATORS)
    assert {row["dtype"] for row in rows} == set(command.DTYPES)
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
    mine = [row for row in rows if row["variant"] == OURS]
    assert all(float(row["speedup_of_ours"]) == 1 for row in mine)
    assert len(mine) == len([row for row in rows if row["variant"] == "eager"])
    kept = {
        (row["operator"], row["variant"]): int(row["kept_bytes"])
        for row in rows
        if (row["dtype"], row["pass"]) == ("float32", "forward")
    }
    assert kept["geglu", OURS] < kept["geglu", "eager"]
    totals = json.loads(output.with_suffix(".json").read_text())["totals"]
    assert {(total["operator"], total["dtype"]) for total in totals} == {
        (name, dtype) for name in ops.OPERATORS for dtype in command.DTYPES
    }
    assert output.with_suffix(".png").stat().st_size > 0
    assert "geglu" in capsys.readouterr().out

    # Timing one of them again keeps the others as they are.
    monkeypatch.setattr("sys.argv", [*sys.argv, "--keep", "--operators", "geglu"])
    command.main()
    with output.with_suffix(".csv").open() as file:
        again = list(csv.DictReader(file))
    assert len(again) == len(rows)
    assert [r for r in again if r["operator"] != "geglu"] == [
        r for r in rows if r["operator"] != "geglu"
    ]
    assert [r for r in again if r["operator"] == "geglu"] != [
        r for r in rows if r["operator"] == "geglu"
    ]
    new_totals = json.loads(output.with_suffix(".json").read_text())["totals"]
    for total in totals:
        if total["operator"] != "geglu":
            (new,) = [t for t in new_totals if key(t) == key(total)]
            assert new["milliseconds"] == pytest.approx(total["milliseconds"], rel=1e-5)
            assert new["kept_bytes"] == total["kept_bytes"]


def key(total: dict[str, Any]) -> tuple[str, ...]:
    return tuple(total[name] for name in ("operator", "network", "dtype", "pass"))
