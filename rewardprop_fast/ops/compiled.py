"""Loading a compiled module of this package, or the reason why it cannot be used."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

# Before any compiled module, whose libgomp.so.1 then resolves to torch's OpenMP pool.
import torch  # noqa: F401

from rewardprop_fast.ops import sources
from rewardprop_fast.version import __version__

_PACKAGE = Path(__file__).resolve().parent.parent


def note_path(name: str) -> Path:
    """Where setup.py writes why the module ``name`` ("_native") could not be built."""
    return _PACKAGE / f"{name}_missing.txt"


def load(name: str, note: Path) -> tuple[Any | None, str | None]:
    """(rewardprop_fast.<name>, None), or (None, why it cannot be used, in words for a person)."""
    try:
        module = import_module(f"rewardprop_fast.{name}")
    except ModuleNotFoundError:
        if note.exists():
            return None, f"not built: {note.read_text(encoding='utf-8').strip()}"
        return None, "not built: installed without it, or run from a source tree"
    except ImportError as error:
        return None, f"built, but it does not load: {error}"
    if module.version() != __version__:
        return None, (
            f"built for version {module.version()}, this is {__version__}: install it again"
        )
    present = sources.fingerprint(name)
    built_from = module.sources() if hasattr(module, "sources") else "older ones"
    if present is not None and built_from != present:
        return None, (
            f"built from other sources ({built_from}) than those here ({present}): build it again "
            "(make, or python setup.py build_ext --inplace)"
        )
    return module, None
