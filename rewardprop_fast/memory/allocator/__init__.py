"""What PyTorch's CUDA caching allocator would reserve for a sequence of allocations and frees.

The bytes of live tensors are not what a card must have: sizes are rounded, and memory is taken from
the driver in segments, which are cut up, merged and kept. `replay` follows the allocator's rules
over a log, `MemoryTracker.events` say. The rules are those of c10/cuda/CUDACachingAllocator of
PyTorch 2 with its default settings, for one stream:

- A size is rounded up to 512 bytes. Up to 1 MiB it is served from segments of 2 MiB, below 10 MiB
  from segments of 20 MiB, above from a segment of its own, rounded up to 2 MiB. The first kind has
  a pool of free blocks of its own, the other two share one.
- The smallest free block of the pool that is large enough is taken, the lowest address among equals
  (here a later segment has the higher address). What is left is cut off its upper end if it is at
  least 512 bytes in the small pool, more than 1 MiB in the large one.
- A freed block is merged with free neighbours of its segment. Segments are kept until the driver
  has no more: then all that are wholly free are given back, and it is tried once more.
- With expandable segments there is one segment to a pool, of addresses without memory, which are
  given memory in pages of 2 MiB (small) and 20 MiB (large) as they are needed; what is left of a
  block is cut off from 512 bytes on.

What it cannot know: memory of libraries and of the context, other streams, what ran before.
"""

from __future__ import annotations

from rewardprop_fast.memory.allocator.replay import Allocator, Event, Reserved, replay, rounded

__all__ = ["Allocator", "Event", "Reserved", "replay", "rounded"]
