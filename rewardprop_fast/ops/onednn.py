"""float32 products by oneDNN instead of MKL, which PyTorch takes by itself.

On an AMD EPYC with AVX-512, beside other work, oneDNN took 0.78 to 0.9 of MKL's time for most
shapes of diffusion models; other processors were not measured. In bfloat16 PyTorch takes oneDNN
already. Weights are not packed beforehand: in bfloat16 the gain was within the noise, in float32
some shapes gained more, at the price of a second copy of the weight for each direction.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x_MK: Tensor, weight_NK: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of dense rows; the weight may be a transposed view."""
    if x_MK.dtype == torch.float32 and x_MK.shape[0] > 0 and _available():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_MK, weight_NK, bias, "none", [], "")
        return product
    return F.linear(x_MK, weight_NK, bias)


@cache
def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
