"""GPU kernels examined without a GPU: `python -m benchmarks.static_gpu`.

Every configuration in which the operators would launch a Triton kernel for SD 1.5, SDXL and their
VAE is recorded, compiled ahead of time for compute capability 8.0, 8.6, 8.9 and 9.0, and its
machine code read; the bytes and FLOPs of its launches are counted in Triton's interpreter; times
are modelled. `gates` says what must hold.
"""
