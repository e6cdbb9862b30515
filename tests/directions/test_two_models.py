"""`locate_vrev(witness, anchor, prompts=…)`: any two models, as the sequence of them."""

from pathlib import Path

import numpy as np
import tiny
from histories import moved, refused

from gravlens.directions.vrev import locate_vrev
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.models.opening import open_model


def test_folders_models_and_opened_models_give_the_direction_of_their_sequence(tmp_path: Path) -> None:
    models = tiny.llama(), moved(tiny.llama(), seed=1)
    folders = [tiny.save(model, tmp_path / name) for name, model in zip(("base", "aligned"), models, strict=True)]
    sequence = ModelSequence.from_folders(witness=folders[0], anchor=folders[1], probes=tiny.PROMPTS)
    wanted = locate_vrev(sequence)
    pairs = [
        folders,
        [str(folder) for folder in folders],
        [open_model(model, tokenizer=tiny.TOKENIZER) for model in models],
        [open_model(folder, through="bridge") for folder in folders],
        [Checkpoint("seed0/20", folders[0]), sequence.anchor],
        [folders[0], open_model(folders[1])],
    ]
    for witness, anchor in pairs:
        found = locate_vrev(witness, anchor, prompts=tiny.PROMPTS)
        assert found.layers == wanted.layers and found[0].prompts == wanted[0].prompts
        np.testing.assert_allclose(found.vectors, wanted.vectors, atol=1e-5)
    one = locate_vrev(*folders, prompts=list(tiny.PROMPTS), layer=1)
    assert np.array_equal(one.vector, wanted[1].vector) and one.made_from["anchor"] == str(folders[1])
    assert locate_vrev(*folders, prompts=tiny.PROMPTS, layer=[2, 1]).layers == (2, 1)


def test_what_two_models_need_is_said(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "base")
    with refused("No prompts"):
        locate_vrev(folder, folder)
    with refused("no tokenizer"):
        locate_vrev(tiny.llama(0), tiny.llama(1), prompts=tiny.PROMPTS)
    with refused("ModelSequence"):
        locate_vrev(ModelSequence.from_folders(witness=folder, anchor=folder), folder, prompts=tiny.PROMPTS)  # pyright: ignore
    with refused("absent"):
        locate_vrev(tmp_path / "absent", folder, prompts=tiny.PROMPTS)
    with refused("A LlamaForCausalLM"):  # the anchor was forgotten
        locate_vrev(tiny.llama(), prompts=tiny.PROMPTS)
    with refused("differ"):
        locate_vrev(folder, folder, prompts=tiny.PROMPTS, layer=1)
