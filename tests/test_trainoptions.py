"""Options of training: what the command line and a config file say, and what a resumed run must keep."""

import importlib.util
from dataclasses import replace

import pytest

from minigate import trainoptions
from minigate.errors import FileError, UsageError
from minigate.trainoptions import Settings, TrainOptions, check_same, parse

BASE = ["--teacher=t.safetensors", "--train=train.tsv", "--dev=dev.tsv", "--output=run", "--steps=10"]
needs_toml = pytest.mark.skipif(not any(map(importlib.util.find_spec, ("tomllib", "tomli"))), reason="no TOML reader")


def test_defaults_are_those_of_the_dataclasses():
    args, settings = parse(BASE)
    assert settings == Settings(TrainOptions(steps=10))
    assert (args.label_cache, args.resume, args.threads) == (None, False, None)
    flat = settings.flat()
    assert (flat["lr"], flat["gate_lr"], flat["warmup"], flat["batch_seconds"], flat["gate_init"]) == (
        2e-5, 2e-4, 100, 80, 0.5)  # fmt: skip


def test_every_option_is_a_flag_and_reaches_its_dataclass():
    values = {
        "gate": "per_head", "gate_init": 0.25, "encoder_layers": 2, "decoder_layers": 1, "audio_context": "variable",
        "batch_seconds": 40.0, "accumulate": 3, "precision": "bf16", "seed": 4, "checkpoint_every": 5, "eval_every": 6,
        "eval_utterances": 7, "eval_outliers": 2, "max_skipped": 9, "max_unreadable": 0.5, "lr": 1e-3, "gate_lr": 1e-2,
        "warmup": 8, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "clip_norm": 2.0, "ema_decay": 0.99,
        "kl_weight": 0.1, "ce_weight": 0.2, "hidden_weight": 0.3, "temperature": 3.0, "outlier_weight": 0.4,
        "outlier_unit": "rms", "outlier_unit_most": 12.0,
        "outlier_tau": 5.0, "outlier_decoder_tau": 2.0, "outlier_power": 2.0, "language": "de", "timestamp_share": 0.1,
        "max_wer": 0.6, "max_compression_ratio": None, "gain_db": 3.0, "noise_share": 0.2, "time_masks": 1,
        "time_mask_s": 0.5, "freq_masks": 2, "freq_mask_bins": 10, "padded_share": 0.2, "pack_seed": 3,
    }  # fmt: skip
    given = [f"--{name.replace('_', '-')}={'none' if value is None else value}" for name, value in values.items()]
    _, settings = parse([*BASE, *given, "--speeds=0.9,1", "--noise-snr-db=3,9", "--freeze", "gates", "encoder",
                         "--outlier-tensors=mlp,block"])  # fmt: skip
    values |= {"steps": 10, "speeds": [0.9, 1.0], "noise_snr_db": [3.0, 9.0], "freeze": ["encoder", "gates"],
               "outlier_tensors": ["mlp", "block"]}  # fmt: skip
    assert settings.flat() == values
    assert set(values) == set(Settings().flat())


def test_a_language_may_be_detected():
    assert parse([*BASE, "--language=auto"])[1].label.language is None


@pytest.mark.parametrize(("argument", "message"), [
    ("--gate=door", "--gate: expected none or per_head"),
    ("--outlier-unit=sigma", "--outlier-unit: expected value or rms"),
    ("--outlier-power=1", "--outlier-power: expected a number above 1"),
    ("--gate-lr=-1", "--gate-lr: expected a number of at least 0"),
    ("--speeds=9", "--speeds: expected different numbers"),
    ("--timestamp-share=2", "--timestamp-share: expected a share"),
    ("--checkpoint-every=0", "--checkpoint-every: expected a whole number of at least 1"),
    ("--audio-context=single", "--audio-context: expected full or variable"),
    ("--threads=0", "--threads: expected a whole number of at least 1"),
    ("--steps=-1", "--steps: expected a whole number of at least 0"),
])  # fmt: skip
def test_wrong_values_name_their_flag(argument, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        parse([*BASE, argument])


@pytest.mark.parametrize("name", ["train", "dev"])
def test_manifests_are_needed_for_a_step(name):
    rest = [argument for argument in BASE if not argument.startswith(f"--{name}=")]
    with pytest.raises(UsageError, match=f"--{name}: expected a manifest"):
        parse(rest)
    assert parse([*rest, "--steps=0"])[1].train.steps == 0


def test_wrong_arguments_are_one_line(capsys):
    for wrong in (["--lr", "fast"], ["--nonsense"], ["--st=4"]):
        with pytest.raises(SystemExit) as exit_code:
            parse([*BASE, *wrong])
        assert exit_code.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


# --- a config file


@needs_toml
def test_a_config_file_is_the_command_lines_default(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('steps = 7\ngate = "per_head"\nlr = 1e-3\nspeeds = [0.9, 1.0]\nfreeze = ["encoder"]\n'
                    'outlier-tensors = "mlp"\neval_every = 20\nresume = true\nquiet = false\noutput = "elsewhere"\n')
    given = [argument for argument in BASE if not argument.startswith(("--output", "--steps"))]
    args, settings = parse([*given, "--config", str(file), "--lr=2e-3"])
    assert (settings.train.steps, settings.train.gate, settings.train.freeze) == (7, "per_head", ("encoder",))
    assert (settings.augment.speeds, settings.distill.outlier_tensors) == ((0.9, 1.0), ("mlp",))
    assert (settings.train.eval_every, args.resume, args.quiet, str(args.output)) == (20, True, False, "elsewhere")
    assert settings.optim.lr == 2e-3


@needs_toml
@pytest.mark.parametrize(("text", "message"), [
    ("learning-rate = 1", "run.toml: expected names of options, such as batch-seconds, got learning-rate"),
    ('config = "other.toml"', "expected names of options"),
    ("resume = 1", "resume: expected true or false, got 1"),
    ("lr = true", "lr: expected a value, got True"),
    ("[optimizer]\nlr = 1", "expected names of options"),
    ("lr = ", "run.toml: expected TOML"),
])  # fmt: skip
def test_config_files_that_are_wrong(tmp_path, text, message):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(FileError, match=message):
        parse([*BASE, f"--config={tmp_path / 'run.toml'}"])


def test_config_files_that_are_not_there(tmp_path):
    with pytest.raises(FileError, match="expected a readable file, got No such file"):
        parse([*BASE, f"--config={tmp_path / 'run.toml'}"])


def test_without_a_toml_reader_it_says_so(monkeypatch, tmp_path):
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(FileError, match="--config: expected Python 3.11 or newer, or the package tomli, got neither"):
        parse([*BASE, "--config=run.toml"])


# --- what a resumed run keeps


def test_a_resumed_run_keeps_its_options_but_the_free_ones():
    _, before = parse([*BASE, "--speeds=0.9,1"])
    facts = {"options": before.flat(), "step": 10}
    other = {"steps": 12, "checkpoint_every": 1, "eval_every": 2, "eval_utterances": 3, "eval_outliers": 4,
             "max_skipped": 5, "max_unreadable": 0.6}  # fmt: skip
    assert set(other) == set(trainoptions.FREE)
    check_same(facts, replace(before, train=TrainOptions(**other)), "run")
    younger = {name: value for name, value in before.flat().items() if name != "outlier_unit"}
    check_same({"options": younger, "step": 10}, before, "run")  # a run from before there was such an option
    with pytest.raises(UsageError, match="^--speeds: expected 0.9,1 like the run in run, got 1; --resume"):
        check_same(facts, parse(BASE)[1], "run")
    with pytest.raises(UsageError, match="^--steps: expected 10 at least, which the run in run has done, got 9"):
        check_same(facts, replace(before, train=TrainOptions(steps=9)), "run")
    with pytest.raises(UsageError, match="^--encoder-layers: expected none like the run in run, got 1"):
        check_same(facts, replace(before, train=TrainOptions(encoder_layers=1)), "run")
