"""tools/bench.py and tools/peers.py: what --engines says, what is installed, the table, an engine from end to end."""

import sys

import numpy as np
import pytest

from minigate import checkpoint
from tests.sounds import write_manifest
from tests.toy import toy_model
from tools import bench, peers

SMALL = dict(n_audio_ctx=1500, n_vocab=1864, n_audio_layer=1, n_text_layer=1)
SPEECH = bench.Speech("some", [], ["red green blue black"], "")


def timed(seconds, cpu, threads=1, text="red green blue white"):
    engine = bench.Engine("minigate:x", threads, False)
    engine.seconds, engine.cpu, engine.starts, engine.first_texts = seconds, cpu, [0.1], [0.5]
    engine.texts, engine.peak_mb, engine.bare_mb = [text], 150.0, 30.0
    return engine


def test_specs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    engine = bench.Engine("ONE=1 TWO=a=b whisper:models/tiny.en.pt@ENV/bin/python", 3, True)
    assert engine.label == "ONE=1 TWO=a=b whisper tiny.en"
    assert [engine.env[name] for name in ("ONE", "TWO", "OMP_NUM_THREADS")] == ["1", "a=b", "3"]
    assert "PYTHONPATH" not in engine.env
    assert engine.command[0] == "ENV/bin/python"
    assert engine.command[2:] == ["--work", "whisper", "models/tiny.en.pt", "3", "timestamps"]
    engine = bench.Engine("minigate:tiny.en-w8a8-dynamic", 1, False)
    assert engine.label == "minigate tiny.en-w8a8-dynamic"
    assert engine.command[0] == sys.executable and engine.env["PYTHONPATH"] == str(bench.ROOT)


@pytest.mark.parametrize("spec", ["minigate", "minigate:", "other:x", "one=1 minigate", "minigate:x@"])
def test_bad_specs(spec):
    with pytest.raises(SystemExit, match="expected .ENVIRONMENT=VALUE .NAME:MODEL"):
        bench.Engine(spec, 1, False)


def test_row_and_notes():
    first, second = timed([1.0, 2.0, 4.0], [1.0, 1.7, 3.9]), timed([2.0, 2.0, 2.0], [2.0, 2.0, 2.0])
    assert bench.row(second, first, SPEECH, None, busy=True) == (
        "| minigate x | some | 1 | 2.00 | 2.00 | 1.00 (0.50 to 2.00) | 0.10 (0.50) | 150 (120) | ? | 25.0 |  |"
    )
    second.same_texts = False
    assert bench.notes(first, SPEECH) == ["Disturbed: minigate x, some, threads 1, of 3 rounds: 2"]
    assert bench.notes(second, SPEECH) == ["Not the same texts in all rounds: minigate x, some, threads 1"]
    assert not timed([2.0], [1.0], threads=2).disturbed()  # threads wait for each other


def test_command_line_names_no_folders():
    words = ["a/test.tsv", "X=1 whisper:/b/c/tiny.en.pt@/d/env/bin/python", "minigate:tiny.en", "--rounds", "5"]
    assert bench.command_line("bench.py", words) == (
        "python tools/bench.py test.tsv 'X=1 whisper:tiny.en.pt@env/bin/python' minigate:tiny.en --rounds 5"
    )


def install(folder, name, requires, **files):
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    lines = [f"Name: {name}", "Version: 1", *(f"Requires-Dist: {r}" for r in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (folder / name).mkdir()
    for stem, size in files.items():
        (folder / name / stem.replace("_", ".")).write_bytes(bytes(size))
    (info / "RECORD").write_text("".join(f"{name}/{stem.replace('_', '.')},,\n" for stem in files))


def test_installed_mb(tmp_path, monkeypatch):
    install(tmp_path, "benched", ["needed>=1", "numpy", 'unneeded; extra == "all"', 'absent; sys_platform == "x"'],
            a_py=1000, a_pyc=50_000, a_safetensors=50_000)  # fmt: skip
    install(tmp_path, "needed", ["benched"], a_so=200_000)
    install(tmp_path, "unneeded", [], a_so=50_000)
    (tmp_path / "benched" / "unlisted.py").write_bytes(bytes(7))
    monkeypatch.syspath_prepend(tmp_path)
    assert peers.installed_mb("Benched", "benched") == pytest.approx(0.201007)


def test_joined(tmp_path):
    rows = bench.read_manifest(write_manifest(tmp_path, [1.0, 2.0, 0.5], ["a", "b", "c"]))
    audio, text = bench.joined(rows, 100, 0)
    assert len(audio) == 5 * bench.SAMPLE_RATE and sorted(text.split()) == ["a", "b", "c"]
    assert len({bench.joined(rows, 100, seed)[1] for seed in range(8)}) > 1
    audio, text = bench.joined(rows, 0.1, 0)
    assert len(audio) / bench.SAMPLE_RATE == pytest.approx({"a": 1.5, "b": 2.5, "c": 1.0}[text])


def test_an_engine_from_end_to_end(tmp_path, capsys):
    model = tmp_path / "toy.safetensors"
    checkpoint.write(model, *toy_model(**SMALL))
    manifest = write_manifest(tmp_path, [0.5, 0.7], ["one", "two"])
    specs = [f"minigate:{model}", f"minigate-batched:{model}"]
    options = ["--rounds", "1", "--threads", "1", "--join", "2", "--engines", *specs]
    assert bench.main([str(manifest), *options]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| minigate")]
    assert [(r[0], r[1]) for r in rows] == [("| minigate toy", "2 short, 1 s"), ("| minigate toy", "long, 2 s"),
                                            ("| minigate-batched toy", "long, 2 s")]  # fmt: skip
    assert all(float(r[3]) > 0 and np.isfinite(float(r[9].removesuffix(" |"))) for r in rows)
