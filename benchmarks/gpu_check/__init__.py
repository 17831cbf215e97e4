"""Every operator on a GPU: right, and how fast. `python -m benchmarks.gpu_check`.

Checks every form of every operator on the device against float64, and the bundled UNet and VAE with
the operators in them; times every form against eager PyTorch, SDPA, peft and xformers where
installed, compares with the modelled figures, and writes benchmarks/results/gpu_check_<device>.md
and .json as it goes. Exit code 0: all passed; 1: failures; 2: no GPU.

Nothing ends it half way: each job runs in a process of its own that may fail, crash, run out of
memory or hang; the job's row says so and the next one starts.
"""
