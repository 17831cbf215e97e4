"""What the files of a run's folder are called, for those who write, read and look for them.

Imports nothing, so that the command can look for a run before torch is loaded.
"""

from __future__ import annotations

CONFIG = "config.yaml"
PLAN = "plan.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
CURVES = "curves.png"
BEFORE_AFTER = "before_after.png"
IMAGES = "images"
CHECKPOINTS = "checkpoints"
LORA = "lora"
