"""The operators in a network of one's own, compiled into one graph: nothing of diffusers or peft.

A frozen transformer block whose query, key and value layers learn through a LoRA. The operators are
ordinary torch operators, so that `torch.compile(fullgraph=True)` takes the block as it is.

python examples/compiled_operators.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rewardprop_fast import ops

HEADS = 4


class Block(nn.Module):
    """(B, L, C) -> (B, L, C): attention and a gated feed-forward part, each added to its input."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()

        def frozen(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) / columns**0.5, requires_grad=False)

        self.qkv = nn.ParameterList(frozen(channels, channels) for _ in range(3))
        self.out = frozen(channels, channels)
        self.up, self.down = frozen(8 * channels, channels), frozen(channels, 4 * channels)
        self.lora_as = nn.ParameterList(
            nn.Parameter(torch.randn(rank, channels) / channels**0.5) for _ in range(3)
        )
        self.lora_bs = nn.ParameterList(nn.Parameter(torch.zeros(channels, rank)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        normed = ops.group_norm(x.transpose(1, 2), num_groups=8).transpose(1, 2)
        query, key, value = (
            tensor.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for tensor in ops.lora_linears(
                normed,
                list(self.qkv),
                [None] * 3,
                list(self.lora_as),
                list(self.lora_bs),
                [1.0] * 3,
            )
        )
        attended = ops.attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + ops.frozen_linear(attended, self.out)
        return x + ops.frozen_linear(ops.geglu(ops.frozen_linear(x, self.up)), self.down)


def main(steps: int = 20, backend: str = "inductor") -> tuple[list[float], float]:
    """The loss of each step, and how far the compiled block is from the block itself."""
    torch.manual_seed(0)
    block = Block(channels=64, rank=4)
    x, target = torch.randn(2, 2, 32, 64)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    losses = []
    for step in range(steps):
        loss = (compiled(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}")
    with torch.no_grad():
        difference = float((compiled(x) - block(x)).abs().max())
    print(f"compiled and not: the same but for {difference:.1e}")
    return losses, difference


if __name__ == "__main__":
    main()
