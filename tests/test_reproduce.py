"""tools/reproduce.py on toy models and noise: its rows, that it resumes, what the table says, bad input."""

import json
from dataclasses import make_dataclass

import numpy as np
import pytest

from minigate import checkpoint, evaluate, wer
from minigate.calibrate import CalibrationOptions, Speech
from minigate.errors import UsageError
from minigate.manifest import read_manifest
from minigate.mel import MelWindows
from minigate.model import load
from minigate.quantize import prepare, quantize_dynamic
from minigate.quantizeoptions import QuantizeOptions
from minigate.wer import Errors
from tests.sounds import write_manifest
from tests.toy import toy_model
from tools import reproduce, resulttable
from tools.reproduce import FLOAT, Variant, Work, parse_variants

SMALL = dict(n_audio_ctx=1500, n_vocab=1864, n_audio_layer=1, n_text_layer=1)
SECONDS = [0.6, 2.4, 1.1, 0.9]
TEXTS = ["z wine", "water", "dogs and cats", "q"]  # z and q are what plain and gated hear in float
DYNAMIC = Variant("w8a8-dynamic", "per-channel")
STATIC = Variant("w8a8-static", "per-tensor")
LINEARS = Variant("linears-only", "per-tensor")
ASKED = ["w8a8-dynamic:per-channel", "w8a8-static:per-tensor", "linears-only:per-tensor"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models plain and gated (a student with a penalty and outliers); manifests list.tsv and, by source, test.tsv."""
    folder = tmp_path_factory.mktemp("reproduce")
    training = {"outlier_weight": 0.1, "outlier_tau": 6.0, "outlier_decoder_tau": 2.0, "lr": 1e-5}
    for name, gate, seed in (("plain", "none", 0), ("gated", "per_head", 1)):
        metadata, tensors = toy_model(gate, seed, **SMALL)
        if seed:
            tensors["decoder.blocks.0.mlp.2.bias"][:2] = 400, -400  # outliers in the residual stream, then undone
            tensors["decoder.ln.weight"] *= np.where(np.arange(32) < 2, 0, 100).astype(np.float32)
        metadata = {**metadata, "audio_context": "variable" if seed else "full"}
        metadata["provenance"] = {"source": "toy", "training": training if seed else None}
        checkpoint.write(folder / f"{name}.safetensors", metadata, tensors)
    lines = write_manifest(folder, SECONDS, TEXTS).read_text().splitlines()
    sources = ["source", "ours", "theirs", "ours", "theirs"]
    lines = ["\t".join([*line.split("\t")[:-1], source]) for line, source in zip(lines, sources, strict=True)]
    (folder / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def arguments(folder, results, models=("plain",), schemes=("w8a8-dynamic:per-channel",), calibration="list.tsv"):
    given = [str(folder / f"{name}.safetensors") for name in models] + ["--test", str(folder / "test.tsv")]
    given += ["--results", str(results), "--accented", "theirs", "--batches", "1", "--threads", "1"]
    given += ["--calibration", str(folder / calibration)] if calibration else []
    return [*given, "--schemes", *schemes]


def rows_of(results):
    return {(row["model"], row["variant"]): row for row in map(json.loads, results.read_text().split("\n\n"))}


@pytest.fixture(scope="module")
def done(folder):
    """A finished run of both models: its results file."""
    results = folder / "done.jsonl"
    assert reproduce.main(arguments(folder, results, ("plain", "gated"), ASKED)) == 0
    return results


@pytest.fixture
def computed(monkeypatch):
    """The variants that are computed, by name."""
    found, compute = [], Work.compute

    def counted(self, subject, variant, plain):
        found.append(f"{subject.label} {variant}")
        return compute(self, subject, variant, plain)

    monkeypatch.setattr(Work, "compute", counted)
    return found


# --- rows


def test_there_is_a_row_for_every_model_and_variant(done):
    assert [*rows_of(done)] == [(m, str(v)) for m in ("plain", "gated") for v in (FLOAT, DYNAMIC, STATIC, LINEARS)]


@pytest.mark.parametrize("label", ["plain", "gated"])
def test_figures_are_those_of_an_evaluation_of_the_quantized_file(folder, done, label, tmp_path):
    rows, path = rows_of(done), folder / f"{label}.safetensors"
    file, test = checkpoint.read(path), read_manifest(folder / "test.tsv")
    checkpoint.write(tmp_path / "m.safetensors", *quantize_dynamic(file.metadata, file.tensors))
    plain, row = rows[label, "float"], rows[label, str(DYNAMIC)]
    expected = evaluate.evaluate(load(tmp_path / "m.safetensors"), test, {"language": "en"})
    for name in ("wer", "ci95", "wer_capped", "ci95_capped", "words", "scored"):
        assert row["report"][name] == expected[name], name
    assert row["report"]["sources"]["native"]["wer"] == expected["sources"]["ours"]["wer"]
    assert row["report"]["sources"]["accented"]["wer"] == expected["sources"]["theirs"]["wer"]
    assert row["bytes"] == (tmp_path / "m.safetensors").stat().st_size and plain["bytes"] == path.stat().st_size
    errors = [[Errors(*(u[n] for n in ("substitutions", "deletions", "insertions", "words")))
               for u in r["report"]["utterances"]] for r in (row, plain)]  # fmt: skip
    assert {**wer.paired_difference(*errors), "scored": 4}.items() <= row["comparison"].items()
    assert plain["comparison"] is None and plain["agreement"] is None


def test_differences_are_to_the_model_in_float(done):
    rows, found = rows_of(done), []
    for (label, variant), row in rows.items():
        if variant != "float":
            found.append(row["report"]["wer"] - rows[label, "float"]["report"]["wer"])
            assert row["comparison"]["wer"] == pytest.approx(found[-1], abs=1e-12), (label, variant)
            low, high = row["comparison"]["ci95"]
            assert low <= found[-1] <= high
    assert max(found) > 0.1


def test_agreement_is_teacher_forced_with_the_float_models_tokens(folder, done, tmp_path):
    rows, file = rows_of(done), checkpoint.read(folder / "gated.safetensors")
    speech = Speech(folder / "list.tsv", file.metadata, 1)
    options = QuantizeOptions("w8a8-static"), CalibrationOptions(batches=1)
    prepared = prepare(file.metadata, file.tensors, *options, speech)
    checkpoint.write(tmp_path / "m.safetensors", *prepared.quantized(()))
    plain, static = load(folder / "gated.safetensors"), load(tmp_path / "m.safetensors")
    counts = {"native": [0, 0], "accented": [0, 0]}
    for row, forced in zip(read_manifest(folder / "test.tsv"), rows["gated", "float"]["forced"], strict=True):
        mel, n = MelWindows(row.file, 8).window(0)
        mel = mel[None, :, : 100 * max(2, -(-n // 100))]
        assert forced["tokens"][0] == plain.tokenizer.sot and len(forced["top1"]) == len(forced["tokens"]) > 5
        best = [m.decode(np.array([forced["tokens"]]), m.start(m.encode(mel)), True)[0].argmax(1)
                for m in (plain, static)]  # fmt: skip
        part = counts["native" if row.source == "ours" else "accented"]
        part[0] += int((best[0] == best[1]).sum())
        part[1] += len(best[0])
    assert rows["gated", str(STATIC)]["agreement"] == counts
    assert 0 < sum(c[0] for c in counts.values()) < sum(c[1] for c in counts.values())


def test_linears_only_has_no_file_and_survives_outliers_in_the_residual_stream(done):
    rows = rows_of(done)
    same = {str(v): sum(n for n, _ in rows["gated", str(v)]["agreement"].values()) for v in (STATIC, LINEARS)}
    assert same[str(STATIC)] < same[str(LINEARS)]  # 29 and 35 of 36
    assert rows["gated", str(LINEARS)]["bytes"] is None


def test_what_rows_say_of_their_model(done):
    rows = rows_of(done)
    assert rows["plain", str(STATIC)]["penalty"] is None
    row = rows["gated", str(STATIC)]
    assert row["penalty"] == {"outlier_weight": 0.1, "outlier_tau": 6.0, "outlier_decoder_tau": 2.0}
    assert row["gate"]["kind"] == "per_head" and row["calibration"]["batches"] == 1
    assert row["outliers"] == rows["gated", "float"]["outliers"] and row["outliers"].keys() == {"full", "variable"}
    assert row["outliers"]["full"] != row["outliers"]["variable"]
    assert rows["plain", "float"]["outliers"].keys() == {"full"}
    assert rows["gated", str(DYNAMIC)]["calibration"] is None


def test_an_option_that_is_new_changes_no_key_of_a_row_without_it(folder, tmp_path, monkeypatch):
    args = reproduce.build_parser().parse_args(arguments(folder, tmp_path / "r.jsonl"))
    work, (subject,) = Work(args, CalibrationOptions()), reproduce.find_subjects([str(folder / "plain.safetensors")])
    extras = (), ("rotate",), ("error-diffusion",)
    variants = [FLOAT, *(Variant("w8a8-static", w, e) for w in reproduce.GRANULARITIES for e in extras)]
    before = [work.key(subject, variant) for variant in variants]
    later = make_dataclass("Later", [("later", bool, False)], bases=(QuantizeOptions,), frozen=True)
    monkeypatch.setattr(reproduce, "QuantizeOptions", later)
    assert [work.key(subject, variant) for variant in variants] == before and len(set(before)) == len(before)


def test_extras_are_rows_of_their_own(folder, tmp_path, capsys):
    """Those that change the float model's activations have outliers of their own."""
    results = tmp_path / "r.jsonl"
    schemes = [f"w8a8-static:per-tensor+{extra}" for extra in reproduce.EXTRAS]
    assert reproduce.main(arguments(folder, results, ["gated"], schemes)) == 0
    plain, *rows = rows_of(results).values()
    assert [row["variant"] for row in rows] == [f"w8a8-static per-tensor + {extra}" for extra in reproduce.EXTRAS]
    same = {extra for extra, row in zip(reproduce.EXTRAS, rows, strict=True) if row["outliers"] == plain["outliers"]}
    assert same == {"bias-correction", "error-feedback", "error-diffusion", "paper"}
    smallest = min(row["bytes"] for row in rows)
    assert smallest < rows[list(reproduce.EXTRAS).index("paper")]["bytes"] < plain["bytes"]
    assert capsys.readouterr().out.count("| w8a8-static per-tensor + smoothquant |") == 3


# --- resuming


def test_finished_rows_are_not_computed_again(folder, done, tmp_path, computed, capsys):
    results = tmp_path / "r.jsonl"
    results.write_bytes(done.read_bytes())
    for n in (["--threads", "1"], ["--finished"]):
        assert reproduce.main([*arguments(folder, results, ("plain", "gated"), ASKED), *n]) == 0
    assert computed == [] and results.read_bytes() == done.read_bytes()
    first, second = capsys.readouterr().out.split("`python tools/reproduce.py")[1:]
    assert first.split("\n", 1)[1] == second.split("\n", 1)[1].rstrip() + "\n" or first.count("| gated |") == 12


def test_a_killed_run_goes_on_where_it_was(folder, done, tmp_path, computed):
    results = tmp_path / "r.jsonl"
    text = done.read_text()
    results.write_text(text[: text.rindex("\n{") + 200])  # in the middle of the last row
    assert reproduce.main(arguments(folder, results, ("plain", "gated"), ASKED)) == 0
    assert computed == [f"gated {LINEARS}"]
    lines = [json.loads(line) for line in results.read_text().splitlines() if line.endswith("}")]
    before = [json.loads(line) for line in text.splitlines() if line]
    assert len(lines) == len(before) == 8 and lines[-1]["report"]["wer"] == before[-1]["report"]["wer"]


def test_only_what_is_new_is_computed(folder, done, tmp_path, computed):
    results = tmp_path / "r.jsonl"
    results.write_bytes(done.read_bytes())
    assert reproduce.main(arguments(folder, results, schemes=["w8a8-dynamic"])) == 0
    assert computed == ["plain w8a8-dynamic per-tensor"]


def test_keys_hash_what_decides_the_figures(folder):
    def key(*more, variant=STATIC, model="plain", **changed):
        args = reproduce.build_parser().parse_args([*arguments(folder, "x"), *more])
        work = Work(args, CalibrationOptions(batches=2, **changed))
        [subject] = reproduce.find_subjects([str(folder / f"{model}.safetensors")])
        return work.key(subject, variant)

    keys = [key(), key(variant=DYNAMIC), key(model="gated"), key("--limit", "2"), key(seed=1), key(ranges="mse"),
            key("--calibration", str(folder / "test.tsv")), key("--test", str(folder / "list.tsv")),
            key("--accented", "ours"), key("--language", "auto"), key(variant=Variant("w8", "per-tensor", ("rotate",))),
            key(variant=Variant("w8", "per-tensor", ("rotate",)), seed=1)]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key("--threads", "2") == keys[0] and key(variant=DYNAMIC, seed=1) == keys[1]


def test_what_cannot_be_made_is_named_and_the_rest_goes_on(folder, tmp_path, monkeypatch, capsys):
    def refuse(*args, **options):
        raise UsageError("rotate: expected a model without gates, got one")

    monkeypatch.setattr(reproduce, "prepare", refuse)
    results = tmp_path / "r.jsonl"
    assert reproduce.main(arguments(folder, results)) == 0
    out, err = capsys.readouterr()
    assert [*rows_of(results)] == [("plain", "float")]
    assert f"plain {DYNAMIC}: rotate: expected a model without gates, got one" in out and "not finished" not in out
    assert "warning: plain w8a8-dynamic per-channel: rotate:" in err


def test_unreadable_recordings_are_told_and_left_out(folder, tmp_path, capsys):
    text = (folder / "test.tsv").read_text()
    for name in ("0.wav", "2.wav", "3.wav"):
        text = text.replace(name, str(folder / name))
    (tmp_path / "test.tsv").write_text(text)
    given = arguments(folder, tmp_path / "r.jsonl")
    given[given.index("--test") + 1] = str(tmp_path / "test.tsv")
    assert reproduce.main(given) == 1
    out, err = capsys.readouterr()
    assert "### all: 3 recordings, 6 words" in out and f"{tmp_path / 'test.tsv'}, line 3: " in err


# --- the table


def figures(wer, low, high):
    return {"wer": wer, "ci95": [low, high], "wer_capped": wer / 2, "ci95_capped": [low / 2, high / 2], "scored": 3,
            "words": 50}  # fmt: skip


def made_row(**changed):
    sources = {"accented": figures(0.5, 0.4, 0.6), "native": figures(0.1, 0.08, 0.12)}
    report = {**figures(0.3, 0.25, 0.35), "sources": sources, "isa": "avx2", "threads": 2, "normaliser": "simple",
              "bootstrap": {"resamples": 10000}}  # fmt: skip
    difference = {**figures(0.02, -0.01, 0.05), "sources": {p: figures(-0.004, -0.01, 0.0) for p in sources}}
    return {"model": "m", "gate": {"kind": "per_head"}, "penalty": {"outlier_weight": 0.1, "outlier_tau": 6.0},
            "variant": "w8 per-tensor", "bytes": 38_160_000, "report": report, "comparison": difference,
            "agreement": {"native": [99, 100], "accented": [40, 50]}, "calibration": None, "commit": "abc1234",
            "outliers": {"full": {"max_abs": 12.34, "kurtosis": 5.67}}, "processor": "a chip, 2 cores",
            **changed}  # fmt: skip


def test_the_table_has_both_parts_and_the_whole():
    lines = resulttable.markdown([made_row()], "command", {}, 0).splitlines()
    assert lines[0] == "`command`" and lines[2] == "a chip, 2 cores; avx2; 2 threads; commit abc1234; normaliser simple"
    start = "| m | per_head | 0.1, 6 | w8 per-tensor | 38.2 | "
    tables = {line: lines[i + 4] for i, line in enumerate(lines) if line.startswith("###")}
    assert tables == {
        "### native: 3 recordings, 50 words": f"{start}10.00 (8.00 to 12.00) | 5.00 (4.00 to 6.00) | -0.40 (-1.00 to "
        "+0.00) | -0.20 (-0.50 to +0.00) | 99.00 | 12.3 | 5.7 |",
        "### accented: 3 recordings, 50 words": f"{start}50.00 (40.00 to 60.00) | 25.00 (20.00 to 30.00) | -0.40 "
        "(-1.00 to +0.00) | -0.20 (-0.50 to +0.00) | 80.00 | 12.3 | 5.7 |",
        "### all: 3 recordings, 50 words": f"{start}30.00 (25.00 to 35.00) | 15.00 (12.50 to 17.50) | +2.00 (-1.00 to "
        "+5.00) | +1.00 (-0.50 to +2.50) | 92.67 | 12.3 | 5.7 |",
    }
    head, rule = (lines[lines.index("### all: 3 recordings, 50 words") + i] for i in (2, 3))
    assert head.count("|") == rule.count("|") == tables["### all: 3 recordings, 50 words"].count("|")


def test_cells_without_figures():
    row = made_row(variant="float", comparison=None, agreement=None, penalty=None, bytes=None)
    text = resulttable.markdown([row], "c", {}, 2)
    assert "| - | float | - | 10.00 (8.00 to 12.00) | 5.00 (4.00 to 6.00) | - | - | - | 12.3 | 5.7 |" in text
    assert text.endswith("\n2 rows are not finished.")
    assert resulttable.markdown([], "c", {}, 3) == "`c`\n\n\n3 rows are not finished."


def test_outliers_of_windows_that_are_cut_stand_behind_a_stroke():
    both = {"variable": {"max_abs": 3, "kurtosis": 4}, "full": {"max_abs": 12.34, "kurtosis": 5.67}}
    assert "| 12.3 / 3.0 | 5.7 / 4.0 |" in resulttable.markdown([made_row(outliers=both)], "c", {}, 0)


def test_one_part_alone_is_the_whole():
    row = made_row()
    del row["report"]["sources"]["accented"]
    text = resulttable.markdown([row], "c", {"m w8 + rotate": "no"}, 0)
    assert text.count("###") == 1 and "### all" in text and text.endswith("\nm w8 + rotate: no")


# --- what is asked for


def test_variants():
    assert parse_variants(["w8:per-tensor", "w8", "w8a8-static:per-channel+paper+smoothquant"]) == [
        FLOAT, Variant("w8", "per-tensor"), Variant("w8", "per-channel"),
        Variant("w8a8-static", "per-channel", ("paper", "smoothquant")),
    ]  # fmt: skip
    options = Variant("linears-only", "per-channel", ("paper", "smoothquant", "bias-correction")).options
    assert options == QuantizeOptions("w8a8-static", "per-channel", ("paper",), 0.5, True)


def test_models_of_one_stem_are_told_apart(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plain.safetensors").write_bytes((folder / "plain.safetensors").read_bytes())
    paths = [tmp_path / "run" / "plain.safetensors", folder / "plain.safetensors", folder / "gated.safetensors"]
    found = [subject.label for subject in reproduce.find_subjects(list(map(str, paths)))]
    assert found == ["run/plain", f"{folder.name}/plain", "gated"]


@pytest.mark.parametrize("changed, code, said", [
    (["--schemes", "w4"], 2, "--schemes: expected linears-only or w8a8-static"),
    (["--schemes", "w8:per-row"], 2, "got 'w8:per-row'"),
    (["--schemes", "w8+luck"], 2, "got 'w8+luck'"),
    (["--schemes", "float"], 2, "got 'float'"),
    (["--schemes", "w8+error-diffusion"], 2, "got 'w8+error-diffusion'"),
    (["--schemes", "linears-only+error-diffusion"], 2, "got 'linears-only+error-diffusion'"),
    (["--limit", "0"], 2, "--limit: expected a whole number of at least 1, got 0"),
    (["--batches", "0"], 2, "--batches: expected"),
    (["--percentile", "20"], 2, "--percentile: expected"),
    (["--threads", "0"], 2, "--threads: expected"),
    (["--test", "gone.tsv"], 1, "gone.tsv"),
    (["--results", "/no/such/folder/r"], 1, "--results: expected a file that can be read and written"),
    (["--language", "klingon"], 2, "--language: expected"),
])  # fmt: skip
def test_bad_input_is_one_line(folder, tmp_path, capsys, changed, code, said):
    assert reproduce.main([*arguments(folder, tmp_path / "r.jsonl"), *changed]) == code
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.startswith("python tools/reproduce.py: error: ") and err.count("\n") == 1


def test_static_rows_need_a_calibration_set(folder, tmp_path, capsys):
    assert reproduce.main(arguments(folder, tmp_path / "r.jsonl", schemes=["w8a8-static"], calibration=None)) == 2
    assert "--calibration: expected a manifest, which w8a8-static per-tensor needs, got none" in capsys.readouterr().err


def test_a_language_that_the_model_does_not_know_ends_the_run(folder, tmp_path, capsys):
    assert reproduce.main([*arguments(folder, tmp_path / "r.jsonl"), "--language", "de"]) == 2
    assert "\npython tools/reproduce.py: error: language: expected en" in capsys.readouterr().err


def test_a_quantized_model_is_refused(folder, tmp_path, capsys):
    metadata, tensors = toy_model(**SMALL)
    checkpoint.write(tmp_path / "q.safetensors", *quantize_dynamic(metadata, tensors))
    given = arguments(folder, tmp_path / "r.jsonl")
    assert reproduce.main([str(tmp_path / "q.safetensors"), *given[1:]]) == 2
    assert "q.safetensors: model: expected a float model, got one quantized as w8a8-dynamic" in capsys.readouterr().err
