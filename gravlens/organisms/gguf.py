"""Convert a GGUF file to a plain Hugging Face folder: fp32 safetensors, tokenizer, chat template.

transformers reads GGUF ten times more slowly than a folder and refuses to save the model, so a file is converted once.
"""

import copy
import hashlib
import io
import shutil
import tempfile
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gravlens.core.errors import GravlensError, at_home, read_object
from gravlens.core.files import is_whole, once, replaced, seal, write_json
from gravlens.core.progress import silent
from gravlens.models.opening import quiet

MARK = "gravlens_gguf.json"
LAYOUT = 1  # raised whenever the folders that are written change


def gguf_to_folder(gguf: Path, folder: Path) -> Path:
    """Convert `gguf` to the Hugging Face folder `folder`, and return `folder`.

    Written atomically. A conversion of the same content is reused, one of another file is replaced.

    Raises:
        GravlensError: the file is not a complete GGUF file that transformers can read; the folder holds anything else.
    """
    gguf, folder = at_home(gguf), at_home(folder)
    mark = {"sha256": _digest(gguf), "layout": LAYOUT}
    _refuse_foreign(folder)

    def make(made: Path) -> None:
        # transformers shows a progress bar of its own for the longest part, whatever its verbosity
        with (
            tempfile.TemporaryDirectory(prefix="gravlens-") as part,
            quiet(),
            redirect_stderr(io.StringIO()) if silent() else nullcontext(),
        ):
            _convert(_alone(gguf, Path(part) / "alone"), made)
        write_json(made / MARK, mark)

    if not folder.exists() or _read_mark(folder) == mark:
        return once(folder, make)
    return replaced(folder, lambda made: (make(made), seal(made)))  # of another file


def is_converted(folder: Path) -> bool:
    """Whether `folder` is a finished conversion of `gguf_to_folder`."""
    return (folder / MARK).is_file() and is_whole(folder)


def _digest(gguf: Path) -> str:
    if not gguf.is_file():
        raise GravlensError(
            f"There is no file {gguf}.", "A GGUF file is needed.", "gravlens fetch smollm2, or check the path."
        )
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            remedy = "download it again, or give a Hugging Face folder."
            raise GravlensError(f"{gguf} does not begin with the bytes GGUF.", "A GGUF file is needed.", remedy)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_mark(folder: Path) -> dict[str, Any] | None:
    mark = folder / MARK
    return read_object(mark) if mark.is_file() else None


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and _read_mark(folder) is None and (folder.is_file() or any(folder.iterdir())):
        wanted = "A new or an empty folder is needed, so that nothing is overwritten."
        raise GravlensError(f"{folder} holds files that gravlens did not write.", wanted, "another folder.")


def _alone(gguf: Path, folder: Path) -> Path:
    # Linked into a folder of its own: transformers prefers a tokenizer.json next to the file to the tokenizer in it.
    folder.mkdir()
    alone = folder / gguf.name
    try:
        alone.symlink_to(gguf.resolve())
    except OSError:  # the file system has no symbolic links
        shutil.copyfile(gguf, alone)
    return alone


def _convert(gguf: Path, folder: Path) -> None:
    try:
        model, tokenizer = _read(gguf)
    except GravlensError:
        raise
    except Exception as error:  # the parser raises exceptions of any type on a broken file
        given = f"{gguf.name} cannot be read ({str(error).strip() or type(error).__name__})."
        wanted = "A complete GGUF file of an architecture that transformers knows is needed."
        remedy = "download it again, install the package `gguf`, or give a Hugging Face folder."
        raise GravlensError(given, wanted, remedy) from error
    _plain(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read(gguf: Path) -> tuple[PreTrainedModel, Any]:
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    # Packed weights would be multiplied by code that transformers fetches, where the package `kernels` is installed.
    if whole := getattr(transformers, "GgufConfig", None):  # older versions always expand the weights
        where |= {"quantization_config": whole(dequantize=True)}
    where |= {"dtype": torch.float32, "output_loading_info": True}
    opened: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, **where)
    model, report = opened
    if absent := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
        given = f"{gguf.name} has no weights for {len(absent)} tensors, such as {absent[0]}."
        raise GravlensError(given, "Every weight of the model is needed.", "download it again.")
    return model, tokenizer


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    # the same weights under a config without quantization: transformers saves no other
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # no second copy in memory
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()  # assign=True gives input and output embeddings separate parameters again
    plain.generation_config = model.generation_config
    return plain
