"""What the common path imports, each time in a fresh interpreter."""

import subprocess
import sys

import pytest

HEAVY = "transformer_lens sklearn scipy matplotlib datasets peft accelerate transformers.modeling_utils".split()


def loaded(code: str) -> set[str]:
    """Modules that are there after a fresh interpreter ran `code`."""
    code = f"import sys; sys.path[:0] = {sys.path}; {code}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.long
@pytest.mark.parametrize("name", ["locate_vrev", "open_model", "generate_answers", "cache_residuals"])
def test_the_path_through_hugging_face_loads_no_other_heavy_library(name: str) -> None:
    assert not loaded(f"import gravlens; gravlens.{name}") & set(HEAVY)


@pytest.mark.long
def test_the_file_of_a_public_name_loads_no_more_than_the_name() -> None:
    assert not loaded("from gravlens.directions.vrev import locate_vrev") & set(HEAVY)


@pytest.mark.long
def test_a_hugging_face_model_is_opened_and_read_without_transformer_lens() -> None:
    opened = "import tiny; from gravlens.models.opening import open_model; from gravlens.models.forward import generate"
    assert "transformer_lens" not in loaded(f"{opened}; generate(open_model(tiny.llama()), [[1, 2]], max_new_tokens=2)")
