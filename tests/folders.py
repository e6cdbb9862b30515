"""Folders of checkpoints as other programs write them: PEFT's adapters, a Hugging Face cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

QV = ["q_proj", "v_proj"]


def snapshot(cache: Path, revision: str, commit: str, make: Callable[[Path], Any], name: str = "owner--name") -> Path:
    """One revision: a branch or tag names a commit, whose files are links to blobs."""
    home = cache / f"models--{name}"
    folder, blobs, ref = home / "snapshots" / commit, home / "blobs", home / "refs" / revision
    make(folder)
    blobs.mkdir(exist_ok=True)
    for path in folder.iterdir():
        blob = path.rename(blobs / f"{commit}-{path.name}")
        path.symlink_to(blob)
    ref.parent.mkdir(exist_ok=True)
    ref.write_text(commit)
    return folder


def adapter(base: Path, folder: Path, seed: int = 0, auto: Any = AutoModelForCausalLM, **changes: Any) -> Path:
    """A LoRA adapter that does something, saved by PEFT over the model in `base`."""
    torch.manual_seed(seed)
    config = {"r": 2, "target_modules": QV, "task_type": "CAUSAL_LM", "init_lora_weights": False, **changes}
    get_peft_model(auto.from_pretrained(base), LoraConfig(**config)).save_pretrained(folder)
    assert not list(folder.glob("model*.safetensors"))
    return folder
