"""CUDA graphs: the device's part of capture and replay. Not run on a GPU yet.

What to do and why: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewardprop_fast.rollout.graph.captured import Captured, Graph, Recorder
from rewardprop_fast.rollout.graph.unet_state import UNetState

#: Before capture: kernels are compiled and tuned, libraries get their workspaces.
_WARM_UPS = 2


class Cuda(Captured):
    """Captures steps as CUDA graphs, whose memory comes from one pool.

    Args:
        device: of the UNet; None is the current one.
        cuda: torch.cuda, or a double of it.
        settings: of `Captured`.
    """

    def __init__(
        self, device: torch.device | None = None, *, cuda: Any = torch.cuda, **settings: Any
    ) -> None:
        super().__init__(_CudaRecorder(device, cuda), **settings)


class _CudaRecorder(Recorder):
    def __init__(self, device: torch.device | None, cuda: Any) -> None:
        self.device, self.cuda = device, cuda
        self.stream: Any = None
        self.pool: Any = None

    def why_not(self, latents: Tensor) -> str | None:
        if not self.cuda.is_available():
            return "CUDA graphs need a GPU, and torch finds none"
        kind = latents.device.type
        if kind != "cuda" and self.cuda is torch.cuda:
            return f"CUDA graphs need the model on a GPU, and it is on {kind}"
        return None

    def capture(
        self,
        run: Callable[[], Tensor],
        buffers: Mapping[str, Tensor],
        changing: Sequence[str],
        state: UNetState,
    ) -> Graph:
        cuda = self.cuda
        # The second: a capture that fails may leave its own stream the current one.
        with cuda.device(self.device), cuda.stream(cuda.current_stream(self.device)):
            if self.pool is None:
                self.pool, self.stream = cuda.graph_pool_handle(), cuda.Stream()
            # Beside the caller's stream: a library's first call there may leave it unfit.
            self.stream.wait_stream(cuda.current_stream())
            with cuda.stream(self.stream):
                for _ in range(_WARM_UPS):
                    run()
            cuda.current_stream().wait_stream(self.stream)
            cuda.empty_cache()  # as capturing does itself, so that the two counts compare
            before = cuda.memory_reserved()
            graph = cuda.CUDAGraph()
            # Other threads (a data loader that pins memory, say) may go on meanwhile.
            with cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                output = run()
            # What the pool has had to grow by; what it shares with other graphs is theirs.
            return _CudaGraph(graph, output, max(0, cuda.memory_reserved() - before))

    def synchronize(self) -> None:
        self.cuda.synchronize(self.device)

    def drop(self) -> None:
        if self.pool is not None:
            self.pool = self.stream = None
            # A pool's memory is of use to others only after that.
            self.cuda.empty_cache()


class _CudaGraph(Graph):
    def __init__(self, graph: Any, output: Tensor, nbytes: int) -> None:
        self.graph, self.output, self.nbytes = graph, output, nbytes

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.output

    def rest(self) -> None:
        pass
