"""What a checkpoint's files may cause: no code is fetched, no other file is read."""

import json
import shutil
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from folders import adapter
from histories import RAGGED, refused
from transformers.distributed.checkpoint import get_distributed_checkpoint_dir
from transformers.quantizers.auto import get_hf_quantizer

from gravlens.activations.cost import plan_reading
from gravlens.activations.residuals import read_residuals
from gravlens.behavior.judges import classifier_judge
from gravlens.core.errors import GravlensError
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.history.weight_files import weight_paths
from gravlens.models.configs import read_config
from gravlens.models.opening import load_tokenizer, open_model
from gravlens.models.swapping import open_each

sys.path.append(str(Path(__file__).resolve().parents[2] / "analyses"))

import measure_support as support

MIXED, IMAGES = "Mixtral", "Qwen3-VL"  # with experts; with a part for images
KERNEL = "someone/attention"
# Family, key anywhere in its config.json, value.
KEYS: dict[str, tuple[str, str, Any]] = {
    "attention": ("llama", "attn_implementation", KERNEL),
    "attention, under the private name": ("llama", "_attn_implementation", KERNEL),
    "attention, a revision and a function": ("llama", "attn_implementation", f"{KERNEL}@main:forward"),
    "attention by parts": ("llama", "attn_implementation", {"": KERNEL}),
    "a kernel in place of a missing package": ("llama", "attn_implementation", "flash_attention_2"),
    "attention of a wrapper": (IMAGES, "attn_implementation", KERNEL),
    "attention of a wrapper's text": (IMAGES, "text_config.attn_implementation", KERNEL),
    "attention of a wrapper's images": (IMAGES, "vision_config._attn_implementation", KERNEL),
    "attention of a wrapper, by parts": (IMAGES, "attn_implementation", {"text_config": KERNEL}),
}


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The repositories that were asked for code. The package `kernels` is there, and has none to give."""
    found: list[str] = []

    def get_kernel(name: str, *_: Any, **__: Any) -> Any:
        found.append(name)
        raise ConnectionError("stub: here code would be fetched and run")

    package = types.ModuleType("kernels")
    package.get_kernel = get_kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", package)
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and "is_kernels_available" in vars(module):
            monkeypatch.setattr(module, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel_hub", get_kernel, raising=False)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    models = {"llama": tiny.llama(), MIXED: support.make(MIXED), IMAGES: support.make(IMAGES)}
    return {name: tiny.save(model, home / name) for name, model in models.items()}


def changed(folder: Path, to: Path, **entries: Any) -> Path:
    """A copy of a folder with entries in its config.json; dots lead into its parts."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    for key, value in entries.items():
        *parts, last = key.split(".")
        table = config
        for part in parts:
            table = table[part]
        table[last] = value
    (to / "config.json").write_text(json.dumps(config))
    return to


def auto(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    wrapper = config.get_text_config() is not config
    return transformers.AutoModelForImageTextToText if wrapper else transformers.AutoModelForCausalLM


def states(source: Any) -> torch.Tensor:
    model = open_model(source)
    return read_residuals(model, RAGGED, layers=range(model.n_layers))


@pytest.mark.parametrize("key", KEYS)
def test_a_kernel_that_a_configuration_names_is_not_fetched(
    folders: dict[str, Path], tmp_path: Path, fetched: list[str], key: str
) -> None:
    family, entry, value = KEYS[key]
    plain, folder = folders[family], changed(folders[family], tmp_path / "model", **{entry: value})
    wanted = states(auto(plain).from_pretrained(plain).eval())
    assert torch.equal(states(folder), wanted)
    read_config(folder)
    load_tokenizer(folder)
    for _, model in open_each(ModelSequence.from_folders(witness=plain, anchor=folder), through="huggingface"):
        assert torch.equal(read_residuals(model, RAGGED, layers=range(model.n_layers)), wanted)
    assert fetched == []
    if "." in entry:  # this version of transformers overwrites it with the whole's
        return
    with pytest.raises((ValueError, ImportError)):  # plain transformers does fetch it
        auto(folder).from_pretrained(folder)
    assert fetched


def test_a_forecast_and_a_classifier_fetch_nothing_either(
    folders: dict[str, Path], tmp_path: Path, fetched: list[str]
) -> None:
    folder = changed(folders["llama"], tmp_path / "model", attn_implementation=KERNEL)
    plan_reading(ModelSequence.from_folders(witness=folder, anchor=folder, probes=tiny.PROMPTS))
    config = transformers.LlamaConfig.from_pretrained(folders["llama"], num_labels=2)
    judge = tiny.save(transformers.LlamaForSequenceClassification(config), tmp_path / "judge")
    judge = changed(judge, tmp_path / "kernel", attn_implementation=KERNEL)
    classifier_judge(judge, harmful_labels=["LABEL_1"])
    assert fetched == []
    with pytest.raises(ValueError, match=KERNEL):
        transformers.AutoModelForSequenceClassification.from_pretrained(judge)
    assert fetched == [KERNEL]


@pytest.mark.parametrize("key", ["experts_implementation", "_experts_implementation"])
@pytest.mark.parametrize("value", ["sonicmoe", "deepgemm"])
def test_experts_are_computed_by_transformers_own_code(
    folders: dict[str, Path], tmp_path: Path, key: str, value: str
) -> None:
    plain, folder = folders[MIXED], changed(folders[MIXED], tmp_path / "model", **{key: value})
    opened, default = open_model(folder), transformers.AutoModelForCausalLM.from_pretrained(plain).eval()
    assert opened.module.config._experts_implementation == default.config._experts_implementation != value
    assert torch.equal(states(opened), states(default))
    followed = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert followed.config._experts_implementation == value  # fetched in the first pass on a GPU


@pytest.mark.parametrize("method", ["fp8", "mxfp8", "mxfp4"])
@pytest.mark.parametrize("part", [None, "text_config"])
def test_quantised_weights_are_dequantised_rather_than_multiplied_by_fetched_code(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, part: str | None
) -> None:
    """A GPU is pretended, on which transformers would keep them quantised."""
    family, key = ("llama", "quantization_config") if part is None else (IMAGES, f"{part}.quantization_config")
    folder = changed(folders[family], tmp_path / "model", **{key: {"quant_method": method}})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    for name in ("is_kernels_available", "is_triton_available"):
        monkeypatch.setattr(f"transformers.quantizers.quantizer_mxfp4.{name}", lambda *_: True)

    def quantiser(config: Any) -> Any:
        return get_hf_quantizer(config, None, {"": "cuda"}, True, {})[0]

    assert quantiser(read_config(folder)).quantization_config.dequantize
    assert not quantiser(transformers.AutoConfig.from_pretrained(folder)).quantization_config.dequantize


@pytest.mark.parametrize("method", ["eetq", "nvfp4"])
def test_weights_that_only_fetched_code_can_multiply_are_refused(
    folders: dict[str, Path], tmp_path: Path, method: str
) -> None:
    folder = changed(folders["llama"], tmp_path / "model", quantization_config={"quant_method": method})
    with refused(str(folder), method):
        open_model(folder)


def test_compressed_tensors_do_without_fetched_kernels(folders: dict[str, Path], tmp_path: Path) -> None:
    found = {"quant_method": "compressed-tensors", "use_optimized_inference": True}
    folder = changed(folders["llama"], tmp_path / "model", quantization_config=found)
    assert read_config(folder).quantization_config == {"quant_method": "compressed-tensors"}


def test_a_configuration_does_not_replace_classes_of_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders[IMAGES], tmp_path / "model", fusion_config={"patch_embeddings": True})
    assert transformers.AutoConfig.from_pretrained(folder).fusion_config
    assert not hasattr(open_model(folder).module.config, "fusion_config")


def as_tokenizer(name: str, file: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for each in ("tokenizer_config.json", "config.json"):
            found = json.loads((folder / each).read_text())
            found.pop("tokenizer_class", None)
            (folder / each).write_text(json.dumps({**found, "tokenizer_class": name} if each == file else found))

    return write


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "AutoModelForCausalLM", "LlamaModelFast", "AutoModelFastFast"])
def test_a_tokenizer_s_class_that_is_a_model_is_refused(
    folders: dict[str, Path], tmp_path: Path, fetched: list[str], file: str, name: str
) -> None:
    """transformers opens whatever class of its own is named, with its weights and its kernels."""
    folder = changed(folders["llama"], tmp_path / "model", attn_implementation=KERNEL)
    as_tokenizer(name, file)(folder)
    for opens in (load_tokenizer, open_model):
        with refused(file, "tokenizer_class", name):
            opens(folder)
    assert fetched == []
    if name != "AutoModelFastFast" or file == "tokenizer_config.json":
        with pytest.raises(ValueError, match=KERNEL):
            transformers.AutoTokenizer.from_pretrained(folder)
        assert fetched == [KERNEL]


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizer", "UnheardOfTokenizer", "Unheard"])
def test_classes_of_tokenizers_are_taken(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = changed(folders["llama"], tmp_path / "model")
    as_tokenizer(name, "tokenizer_config.json")(folder)
    assert isinstance(load_tokenizer(folder), transformers.PreTrainedTokenizerBase)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "transformers_weights", "other.safetensors"),
        ("llama", "backbone", "someone/model"),
        (IMAGES, "vision_config.backbone", "someone/model"),
        (IMAGES, "vision_config.architecture", "hf-hub:someone/model"),
        ("llama", "per_layer_config", {"0": {"_attn_implementation": "flash_attention_2"}}),
    ],
)
def test_a_configuration_that_leads_elsewhere_is_refused(
    folders: dict[str, Path], tmp_path: Path, family: str, key: str, value: Any
) -> None:
    folder = changed(folders[family], tmp_path / "model", **{key: value})
    for opens in (open_model, load_tokenizer, read_config):
        with refused("config.json", key.split(".")[-1]):
            opens(folder)


def test_what_would_be_read_in_place_of_the_weights_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Beside such shards transformers reads every file of the folder; the digest of one is the store's key."""
    folder = changed(folders["llama"], tmp_path / "model")
    weight_paths(folder)
    other = tiny.save(tiny.llama(1), tmp_path / "other")
    shutil.move(other / "model.safetensors", folder / "shard-00000-model-00001-of-00001.safetensors")
    with refused("shard-00000", str(folder)):
        weight_paths(folder)
    with pytest.raises(GravlensError):
        open_model(folder)
    assert get_distributed_checkpoint_dir(folder, "", None, None)  # of several files with one tensor any may win


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that a connection was asked for, outside of offline mode; there is none."""
    found: list[Any] = []

    def connect(address: Any, *_: Any, **__: Any) -> Any:
        found.append(address)
        raise ConnectionRefusedError("stub")

    monkeypatch.setattr("socket.create_connection", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for proxy in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.lower(), raising=False)
    return found


NAMES = {  # entries of config.json and tokenizer_config.json that name something on a hub
    "names": ({"_name_or_path": "someone/a", "name_or_path": "someone/a"}, {"name_or_path": "someone/a"}),
    "code": (
        {"auto_map": {"AutoConfig": "someone/a--c.X", "AutoModelForCausalLM": "someone/a--m.X"}},
        {"auto_map": {"AutoTokenizer": ["someone/a--t.X", None]}},
    ),
    "code of an unknown family": ({"model_type": "unheard", "auto_map": {"AutoConfig": "someone/a--c.X"}}, {}),
    "a backbone": ({"model_type": "detr", "backbone": "someone/a", "use_timm_backbone": False}, {}),
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("through", ["huggingface", "bridge"])
def test_a_folder_is_opened_without_a_connection(
    folders: dict[str, Path], tmp_path: Path, calls: list[Any], names: str, through: Any
) -> None:
    folder, (config, tokens) = tmp_path / "model", NAMES[names]
    changed(folders["llama"], folder, **config)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tokens))
    trained = over_nothing(adapter(folders["llama"], tmp_path / "adapter"))
    for opens in (
        lambda: open_model(folder, through=through),
        lambda: open_model(Checkpoint("run/1", trained, base=Checkpoint("base", folder)), through=through),
        lambda: open_model(trained),
    ):
        with suppress(GravlensError):
            opens()
    assert calls == []
    if names == "a backbone":
        with pytest.raises(Exception, match=r"."):
            transformers.AutoConfig.from_pretrained(folder)
        assert calls


def over_nothing(folder: Path) -> Path:
    path = folder / "adapter_config.json"
    entries = {"base_model_name_or_path": "someone/a", "revision": "main"}
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder
