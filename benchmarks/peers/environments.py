"""The environment of TRL: a virtual environment made from the package registry, and kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

#: The last TRL with AlignPropTrainer, and what it was released beside.
TRL = ("trl==0.23.1", "transformers==4.56.2", "diffusers==0.35.1", "peft==0.17.1")
TRL = (*TRL, "accelerate==1.10.1")
_MARK = "complete.json"


class EnvironmentError_(RuntimeError):
    """An environment could not be made; the message says why and what to do."""


def trl_python(cache: Path) -> str:
    """The interpreter of TRL's environment, with this process's version of torch.

    Raises:
        EnvironmentError_: the registry is out of reach, or has no such packages.
    """
    import torch

    packages = [f"torch=={torch.__version__.partition('+')[0]}", *TRL, "safetensors", "numpy"]
    folder = cache / "trl-environment"
    python = folder / "bin" / "python"
    mark = folder / _MARK
    if mark.is_file() and json.loads(mark.read_text()) == packages and python.is_file():
        return str(python)
    print(f"making TRL's environment in {folder} (some minutes the first time)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if torch.version.cuda is None:
        # The registry's own torch brings gigabytes of CUDA along; this one is for CPUs.
        local = [*pip, f"torch=={torch.__version__}"]
        index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
        if subprocess.run([*local], capture_output=True, check=False).returncode != 0:
            subprocess.run([*local, *index], capture_output=True, check=False)
    _run([*pip, *packages])
    mark.write_text(json.dumps(packages))
    return str(python)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line for line in done.stderr.strip().splitlines() if "WARNING" not in line]
        raise EnvironmentError_(
            f"TRL's environment could not be made. `{' '.join(command)}` said: "
            f"{(said or ['nothing'])[-1]} Is the package registry reachable (pip config list)? "
            "Without TRL: --competitors ours loop loop-checkpoint. With an environment of your "
            f"own ({' '.join(TRL)}): --trl-python /path/to/python."
        )
