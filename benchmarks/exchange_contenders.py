"""PYTHON benchmarks/exchange_contenders.py PROGRAM FOLDER    (benchmarks/exchange.py calls it; gravlens is not needed)

Runs a model steered by each file of FOLDER in PROGRAM, and writes the logits at every token to FOLDER/PROGRAM.npz.

    repeng       pip install repeng                   {file}.gguf, by its own `ControlVector.import_gguf`
    lm_eval      pip install 'lm-eval[hf]'            {file}.pt, by its own `steered` model
    llama_cpp    pip install llama-cpp-python gguf    {file}.gguf, laid out as llama.cpp's `--control-vector` does it
"""

import ctypes
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

Logits = Iterator[tuple[str, list[np.ndarray]]]  # file (or "unsteered") -> [token, vocabulary] of each prompt


def repeng(home: Path, ids: list[list[int]]) -> Logits:
    """`ControlModel` over the layers that a file names."""
    import torch
    from repeng import ControlModel, ControlVector
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32).eval()

    def run() -> list[np.ndarray]:
        with torch.no_grad():
            return [model(torch.tensor([one])).logits[0].numpy() for one in ids]

    yield "unsteered", run()
    for path in sorted(home.glob("layer*.gguf")):
        vector = ControlVector.import_gguf(path)
        control = ControlModel(model, list(vector.directions))
        control.set_control(vector, 1.0)
        yield path.stem, run()
        control.unwrap()
        vector.export_gguf(home / "repeng_back.gguf")


def lm_eval(home: Path, ids: list[list[int]]) -> Logits:
    """The model that `--model steered` makes, and its own call."""
    import torch
    from lm_eval.models.hf_steered import SteeredModel
    from lm_eval.models.huggingface import HFLM

    where = {"pretrained": str(home / "model"), "device": "cpu", "dtype": "float32", "batch_size": 1}

    def run(model: HFLM) -> list[np.ndarray]:
        with torch.no_grad():
            return [model._model_call(torch.tensor([one]))[0].numpy() for one in ids]

    yield "unsteered", run(HFLM(**where))
    for path in sorted(home.glob("layer*.pt")):
        yield path.stem, run(SteeredModel(steer_path=str(path), **where))


def llama_cpp(home: Path, ids: list[list[int]]) -> Logits:
    """`llama_set_adapter_cvec` on a context in fp32; it has no layer 0."""
    import llama_cpp.llama_cpp as llama

    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(home / "model.gguf").encode(), llama.llama_model_default_params())
    wanted = llama.llama_context_default_params()
    wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = 256
    wanted.n_threads = wanted.n_threads_batch = 1
    wanted.type_k = wanted.type_v = llama.GGML_TYPE_F32
    wanted.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama.llama_init_from_model(model, wanted)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    width, layers = llama.llama_model_n_embd(model), llama.llama_model_n_layer(model)

    def run() -> list[np.ndarray]:
        return [_decoded(llama, context, one, vocabulary) for one in ids]

    yield "unsteered", run()
    for path in sorted(home.glob("layer*.gguf")):
        data = _control_data(path, width)
        if data is not None:
            pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            assert llama.llama_set_adapter_cvec(context, pointer, data.size, width, 1, layers) == 0
            yield path.stem, run()


def _control_data(path: Path, width: int) -> np.ndarray | None:
    """As common_control_vector_load does it: layer 1 first, zeros where a layer is absent, no file with a layer 0."""
    import gguf

    tensors = {int(tensor.name.split(".")[1]): tensor.data for tensor in gguf.GGUFReader(path).tensors}
    if 0 in tensors:
        return None
    data = np.zeros((max(tensors), width), dtype=np.float32)
    for layer, vector in tensors.items():
        data[layer - 1] = vector
    return data.reshape(-1)


def _decoded(llama, context, ids: list[int], vocabulary: int) -> np.ndarray:
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert llama.llama_decode(context, batch) == 0
    found = [
        np.ctypeslib.as_array(llama.llama_get_logits_ith(context, i), (vocabulary,)).copy() for i in range(len(ids))
    ]
    llama.llama_batch_free(batch)
    return np.stack(found)


PACKAGES = {"repeng": "repeng", "lm_eval": "lm-eval", "llama_cpp": "llama-cpp-python"}

if __name__ == "__main__":
    program, folder = sys.argv[1], Path(sys.argv[2])
    prompts = json.loads((folder / "ids.json").read_text())
    contender = {"repeng": repeng, "lm_eval": lm_eval, "llama_cpp": llama_cpp}[program]
    logits = {file: np.concatenate(rows) for file, rows in contender(folder, prompts)}
    np.savez(folder / f"{program}.npz", version=version(PACKAGES[program]), **logits)
