"""The race: one training step of this library against what people would use instead.

    python -m benchmarks.peers --workloads bundled-k1 sd15-256-k1

TRL 0.23.1's AlignPropTrainer in an environment of its own, a hand-written loop of diffusers and
peft, and this library, on the same weights, prompts, noise, LoRA and reward. Gradients are
compared first, and a run whose gradients disagree does not count.
"""
