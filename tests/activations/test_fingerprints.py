"""What a checkpoint is, in one digest: weights, configuration, how it is read; and the memo of digests."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from histories import hooked_twin, refused
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from gravlens.activations import fingerprint as fingerprints
from gravlens.activations.fingerprint import fingerprint
from gravlens.history import sources
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import resolve
from gravlens.history.weight_files import contents

HOW = ("huggingface", "float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.llama(0).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
def memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fingerprints, "SETTLED", 0)
    return tmp_path / "memo"


def digest(folder: Path, memo: Path | None = None, how: Any = HOW) -> str:
    return fingerprint(resolve(Checkpoint("x", folder), weights=False), how, memo)


def add(folder: Path, amount: float) -> None:
    """Change one weight, and leave size and time of the file as they were."""
    path = folder / "model.safetensors"
    stat, weights = path.stat(), load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += amount
    save_file(weights, path, {"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_it_is_what_the_states_depend_on_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    first = digest(folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert digest(tmp_path / "elsewhere") == first
    assert len({first, digest(folder, how=("bridge", "float32")), digest(folder, how=("huggingface", "bf16"))}) == 3
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}))
    assert digest(folder) == first
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert digest(folder) != first
    add(tmp_path / "elsewhere", 1e-3)
    assert digest(tmp_path / "elsewhere") != first


def test_a_memo_spares_the_weights_and_is_not_believed_where_they_changed(
    folder: Path, memo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, read = digest(folder, memo), []
    monkeypatch.setattr(sources, "contents", lambda named: read.append(1) or contents(named))
    assert digest(folder, memo) == first and read == []
    add(folder, 1e-3)
    assert digest(folder, memo) == digest(folder) != first and len(read) == 2


@pytest.mark.parametrize("at", range(0, 400, 37))
def test_a_memo_with_a_flipped_bit_is_not_believed(folder: Path, memo: Path, at: int) -> None:
    first = digest(folder, memo)
    (path,) = memo.iterdir()
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1
    path.write_bytes(content)
    assert digest(folder, memo) == first


def test_what_was_written_a_moment_ago_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    digest(folder, tmp_path / "memo")
    assert not (tmp_path / "memo").exists()


def test_a_hub_s_revision_is_known_by_its_commit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also once its weights were evicted; two commits are two; the same path outside the cache is a folder."""
    home = in_cache(folder, tmp_path / "hub")
    alike = digest(home / ("a" * 40))
    assert alike == digest(home / ("b" * 40)) == digest(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    one, other = digest(home / ("a" * 40)), digest(home / ("b" * 40))
    assert len({alike, one, other}) == 3
    (home / ("a" * 40) / "model.safetensors").unlink()
    assert digest(home / ("a" * 40)) == one


def in_cache(folder: Path, cache: Path) -> Path:
    """Two commits of one repository with the content of a folder, as the hub's client lays them out."""
    home = cache / "models--owner--name"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(folder, home / "snapshots" / commit)
        weights = home / "snapshots" / commit / "model.safetensors"
        blob = home / "blobs" / hashlib.sha256(weights.read_bytes()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        weights.replace(blob)
        weights.symlink_to(blob)
    return home / "snapshots"


@pytest.mark.parametrize("where", ["blob", "link"])
def test_a_snapshot_that_was_altered_is_not_taken_for_its_commit(
    folder: Path, memo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = in_cache(folder, tmp_path / "hub") / ("a" * 40)
    published = digest(snapshot, memo)
    assert published == digest(snapshot, memo) != digest(folder)
    if where == "link":
        content = (snapshot / "model.safetensors").read_bytes()
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").write_bytes(content)
    add(snapshot, 1e-3)
    add(folder, 1e-3)
    assert digest(snapshot, memo) == digest(folder) != published


# -- models in memory, and what is around them -------------------------------------------------------------------------


def in_memory(model: Any) -> str:
    return fingerprint(resolve(Checkpoint("x", model)), HOW)


class Wrapped(nn.Module):
    """repeng's way: a block with a vector to add."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.control = inner, [0.0]

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.inner(*given, **named) + self.control[0]


def wrap(model: Any, control: float) -> None:
    if not isinstance(model.model.layers[1], Wrapped):
        model.model.layers[1] = Wrapped(model.model.layers[1]).eval()
    model.model.layers[1].control[0] = control


def triple(model: Any) -> None:
    part = model.model.layers[0].mlp
    part.forward = lambda x, real=part.forward: 3 * real(x)


CHANGES = {
    "a replaced forward": triple,
    "a wrapper's vector": lambda model: wrap(model, 5.0),
    "an attribute": lambda model: (
        setattr(model.model.norm, "variance_epsilon", 0.0)
        or [setattr(block.input_layernorm, "variance_epsilon", 1.0) for block in model.model.layers]
    ),
    "a scale": lambda model: [setattr(block.self_attn, "scaling", 5.0) for block in model.model.layers],
    "an activation": lambda model: [setattr(block.mlp, "act_fn", nn.ReLU().eval()) for block in model.model.layers],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_acts_on_states_is_in_the_key(change: Any) -> None:
    model = tiny.llama(0)
    first = in_memory(model)
    assert in_memory(model) == first == in_memory(tiny.llama(0))
    if change is CHANGES["a wrapper's vector"]:
        wrap(model, 0.0)
        wrapped = in_memory(model)
        assert wrapped != in_memory(change(model) or model)
        wrap(model, 0.0)
        assert in_memory(model) == wrapped
        return
    change(model)
    assert in_memory(model) != first


class Recording(TorchDispatchMode):
    """A mode of the user's own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def hook_on_all() -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, args, output: None)
    yield
    handle.remove()


@pytest.mark.parametrize(
    ("around", "named"),
    [
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "torch.autocast"),
        (hook_on_all, "a hook on all modules"),
        (Recording, "Recording"),
    ],
)
def test_what_is_around_a_call_is_refused(folder: Path, around: Any, named: str) -> None:
    for work in (lambda: digest(folder), lambda: in_memory(tiny.llama(0))):
        with around(), refused(f"{named} is active"):
            work()
        work()
    with torch.device("cpu"):  # a mode too, and without effect
        digest(folder)


def test_products_in_another_precision_are_other_states(folder: Path) -> None:
    first, before = digest(folder), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert digest(folder) != first
    finally:
        torch.set_float32_matmul_precision(before)
    assert digest(folder) == first


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("kind", ["HookedTransformer", "bridge"])
def test_a_raw_hook_inside_a_model_of_transformer_lens_is_refused(tmp_path: Path, hook: str, kind: str) -> None:
    twin = hooked_twin(tiny.gpt2(0)) if kind == "HookedTransformer" else tiny.opened("bridge", tmp_path).module
    first = in_memory(twin)
    part = twin.blocks[0].mlp if kind == "HookedTransformer" else twin.original_model.model.layers[0].mlp.down_proj
    handle = getattr(part, hook)(lambda *_: None)
    with refused("has hooks on it"):
        in_memory(twin)
    handle.remove()
    assert in_memory(twin) == first


@pytest.mark.parametrize("place", [(LlamaMLP, "forward"), (LlamaRMSNorm, "__init__"), (nn.functional, "silu")])
def test_replaced_code_of_a_library_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, place: Any) -> None:
    first, own = digest(folder), getattr(*place)
    monkeypatch.setattr(*place, lambda *given, **named: own(*given, **named))
    with refused("was replaced"):
        digest(folder)
    monkeypatch.undo()
    assert digest(folder) == first


def test_replaced_attention_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *given, **named: None)
    with refused("sdpa was replaced"):
        digest(folder)


def test_what_acts_on_later_positions_alone_is_in_the_digest_of_a_model() -> None:
    model = tiny.llama(0).eval()
    model.config.use_cache = False
    checkpoint = resolve(Checkpoint("x", model))
    first, mlp = fingerprint(checkpoint, HOW), model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: torch.cat([own(x[:, :20]), 3 * own(x[:, 20:])], 1)
    assert fingerprint(checkpoint, HOW) != first
    mlp.forward = own
    assert fingerprint(checkpoint, HOW) == first
