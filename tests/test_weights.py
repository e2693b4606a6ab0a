"""What lies in weights/: as its README says, and able to hear."""

import hashlib
import re

import pytest

import minigate
from minigate.model import weights_folder

FOLDER = weights_folder()
MODELS = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
SAID = ("And the answer that comes back is, well, I wouldn't start from here, sonny. That is to say much of political "
        "philosophy develops theories that take no account of where we actually are.")  # fmt: skip


def test_files_are_those_of_the_table():
    text = (FOLDER / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| `([^`]+)` \|[^|]+\| (\d+) \| `([0-9a-f]{64})` \|$", text, re.MULTILINE)
    assert {name for name, _, _ in rows} == {f"{name}.safetensors" for name in MODELS} | {"sample.wav"}
    for name, size, sha256 in rows:
        data = (FOLDER / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (int(size), sha256), name


@pytest.mark.parametrize("name", MODELS)
def test_every_model_hears_the_sample(name):
    assert minigate.load(name).transcribe(str(FOLDER / "sample.wav")).text.strip() == SAID


def test_the_gated_student_is_whole_in_integers():
    how = minigate.load("tiny.en-gated-w8a8").metadata["quantization"]
    assert (how["scheme"], how["weights"], how["keep_float"]) == ("w8a8-static", "per-tensor", [])
    assert how["helpers"]["error_diffusion"]
