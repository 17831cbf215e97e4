"""The methods by name, as they ship; T is the chain's length."""

from __future__ import annotations

import rewardprop_fast as rpf
from benchmarks.experiments.size import Size
from rewardprop_fast.methods import Method

TITLES = {
    "draft-1": "DRaFT-1",
    "draft-2": "DRaFT-2",
    "draft-5": "DRaFT-5",
    "draft-T": "DRaFT, all T",
    "draft-lv": "DRaFT-LV",
    "alignprop": "AlignProp",
    "refl": "ReFL",
    "drtune": "DRTune",
    "srpo": "Direct-Align",
    "ddpo": "DDPO",
    "trl-random": "TRL, random truncation",
    "trl-last": "TRL, last step",
    **{f"draft-lv-{n}": f"DRaFT-LV, n = {n}" for n in (1, 2, 4, 8)},
}


def method(name: str, size: Size) -> Method:
    """A fresh method; DRaFT-LV's n may stand behind its name."""
    if name.startswith("draft-lv-"):
        return rpf.DRaFTLV(int(name.removeprefix("draft-lv-")))
    makers = {
        "draft-1": lambda: rpf.DRaFT(1),
        "draft-2": lambda: rpf.DRaFT(2),
        "draft-5": lambda: rpf.DRaFT(min(5, size.steps)),
        "draft-T": lambda: rpf.DRaFT(None),
        "draft-lv": rpf.DRaFTLV,
        "alignprop": rpf.AlignProp,
        "refl": rpf.ReFL,
        "drtune": rpf.DRTune,
        "srpo": rpf.SRPO,  # without words, as the style reward reads none: Direct-Align
        "ddpo": rpf.DDPO,
    }
    return makers[name]()
