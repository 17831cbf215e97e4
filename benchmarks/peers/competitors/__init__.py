"""Who takes part. Each file: `make(job, variant)` gives an object with three methods.

gradients(random_seed) -> ({name: gradient}, rewards)   without an update
step() -> {phase: seconds}                              a whole update
held() -> tensors                                       there before a step
"""
