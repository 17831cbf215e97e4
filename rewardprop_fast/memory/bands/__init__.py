"""A decoder's backward pass in bands of rows: exact, and without its full-size intermediate images.

The last resnets of a VAE's decoder work on images as large as the picture. Recomputing one of them
in backward needs its input, its output's gradient and four or five images of that size between
them. Here the images between are made band by band: a few rows, with as many rows around them as
the 3x3 convolutions see. Two full images are left, the gradient that comes and the one that goes.

GroupNorm couples all rows, forward by its mean and deviation, which the forward pass keeps (one
number for each group), backward by two sums over the whole image. A pass over the bands adds these
up before the next one uses them, and whatever a later pass needs of an earlier one waits in the
memory of the gradient that goes. See `resnet`, which has the passes, and their cost.
"""

from __future__ import annotations

from rewardprop_fast.memory.bands.decoder import Bands, band_decoder
from rewardprop_fast.memory.bands.head import banded_head
from rewardprop_fast.memory.bands.resnet import banded_resnet, why_not_resnet
from rewardprop_fast.memory.bands.rows import ROWS

__all__ = ["ROWS", "Bands", "band_decoder", "banded_head", "banded_resnet", "why_not_resnet"]
