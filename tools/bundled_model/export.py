"""Stage 5: what ships, in fp16, with licence notices: the pipeline's and the rewards' folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer
from unet import TextToLatents, build_scheduler

NOTICE = """\
The weights in this folder were trained for rewardprop_fast, from random initialisation, on pictures
rendered from these emoji sets:

- Noto Emoji (npm @iconify-json/noto, @iconify-json/noto-v1), Google, Apache License 2.0
- Fluent Emoji, flat (npm @iconify-json/fluent-emoji-flat), Microsoft Corporation, MIT License
- FxEmojis (npm @iconify-json/fxemoji), Mozilla, Apache License 2.0

The pictures themselves are not part of the package. The weights are published under the package's
own licence, Apache-2.0; the notices of the MIT License of Fluent Emoji follow.

MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def pipeline(
    vae: AutoencoderKL, model: TextToLatents, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def forget_origin(file: Path) -> None:
    """Drop the folder that a part was loaded from, which says nothing on another machine."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.pop("_name_or_path", None) is not None:
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_pipeline(pipe: StableDiffusionPipeline, tokenizer_folder: Path, target: Path) -> int:
    """Write `target` anew; returns its size in bytes."""
    shutil.rmtree(target, ignore_errors=True)
    pipe.to(torch.float16)
    pipe.save_pretrained(target, safe_serialization=True)
    for file in target.rglob("*.json"):
        forget_origin(file)
    for name in ("vocab.json", "merges.txt"):  # older transformers read these, newer tokenizer.json
        shutil.copy(tokenizer_folder / name, target / "tokenizer" / name)
    (target / "NOTICE").write_text(NOTICE)
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
