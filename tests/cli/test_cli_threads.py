"""The command's threads sleep while they wait; seen from OpenMP's own account of its settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def openmp_says(tmp_path: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rewardprop_fast", "doctor"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "verbose", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch has no libgomp that prints its settings")
    return done.stderr


def test_the_commands_threads_sleep_while_they_wait(tmp_path: Path) -> None:
    # libgomp prints the policy PASSIVE also where none was set; its count of turns tells
    assert "GOMP_SPINCOUNT = '0'" in openmp_says(tmp_path)


def test_a_users_own_setting_stays(tmp_path: Path) -> None:
    assert "GOMP_SPINCOUNT = '123'" in openmp_says(tmp_path, GOMP_SPINCOUNT="123")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in openmp_says(tmp_path, OMP_WAIT_POLICY="active")
