"""The command line of quantization: defaults, what belongs together, and errors that name the flag."""

import pytest

from minigate import quantizeoptions
from minigate.errors import UsageError
from minigate.quantizeoptions import QuantizeOptions, parse

MINIMAL = ["m.safetensors", "--output", "o.safetensors"]


def test_weights_are_per_tensor_for_static_and_per_channel_otherwise_unless_told():
    assert [QuantizeOptions(scheme=s).weights for s in ("w8a8-static", "w8a8-dynamic", "w8")] == [
        "per-tensor", "per-channel", "per-channel"]  # fmt: skip
    assert QuantizeOptions(scheme="w8", weights="per-tensor").weights == "per-tensor"


def test_everything_on_the_command_line():
    args, options, calibration = parse([
        *MINIMAL, "--calibration", "c.tsv", "--scheme", "w8a8-static", "--weights", "per-channel", "--ranges",
        "percentile", "--percentile", "99.9", "--batches", "3", "--keep-float", "paper", "decoder.ln", "--smoothquant",
        "0.5", "--bias-correction", "--equalize", "--rotate", "--error-feedback",
        "--error-diffusion", "--sensitivity", "--auto-keep-float", "0.1", "--seed", "4", "--threads", "2"])  # fmt: skip
    assert args.calibration == "c.tsv" and args.sensitivity and args.auto_keep_float == 0.1 and args.threads == 2
    assert options == QuantizeOptions("w8a8-static", "per-channel", ("paper", "decoder.ln"), 0.5, True, True, True,
                                      True, True)  # fmt: skip
    assert options.helpers == {"smoothquant": 0.5, "bias_correction": True, "equalize": True, "rotate": True,
                               "error_feedback": True, "error_diffusion": True}  # fmt: skip
    assert (calibration.ranges, calibration.percentile, calibration.batches, calibration.seed) == (
        "percentile", 99.9, 3, 4)  # fmt: skip


def test_defaults():
    args, options, calibration = parse([*MINIMAL, "--calibration", "c.tsv"])
    assert options == QuantizeOptions() and options.scheme == "w8a8-static" and options.keep_float == ()
    assert (calibration.ranges, calibration.percentile, calibration.batches, calibration.seed) == (
        "minmax", 99.999, 16, 0)  # fmt: skip
    assert args.auto_keep_float is None and not args.sensitivity


@pytest.mark.parametrize("arguments", [
    [*MINIMAL, "--scheme", "w8"], [*MINIMAL, "--scheme", "w8a8-dynamic", "--equalize", "--rotate"],
    [*MINIMAL, "--scheme", "w8", "--calibration", "c.tsv"], ["--inspect", "m.safetensors"],
    ["m.safetensors", "--sensitivity", "--calibration", "c.tsv"],
])  # fmt: skip
def test_what_is_enough(arguments):
    parse(arguments)


@pytest.mark.parametrize(("arguments", "said"), [
    (MINIMAL, "--calibration: expected a manifest, which --scheme w8a8-static needs"),
    ([*MINIMAL, "--scheme", "w8", "--smoothquant", "0.5"], "--calibration: .* which --smoothquant needs"),
    ([*MINIMAL, "--scheme", "w8", "--smoothquant", "0"], "--calibration: .* which --smoothquant needs"),
    ([*MINIMAL, "--scheme", "w8", "--bias-correction"], "--calibration: .* which --bias-correction needs"),
    ([*MINIMAL, "--scheme", "w8", "--sensitivity"], "--calibration: .* which --sensitivity needs"),
    ([*MINIMAL, "--scheme", "w8", "--auto-keep-float", "0"], "--calibration: .* which --auto-keep-float needs"),
    ([*MINIMAL, "--scheme", "w8", "--error-diffusion"], "--error-diffusion: expected w8a8-static, .* got w8"),
    (["m.safetensors", "--scheme", "w8"], "--output: expected a file to write, got none"),
    (["m.safetensors", "--scheme", "w8", "--output", "x.bin"], "--output: .* ends in .safetensors, got x.bin"),
    (["--output", "o.safetensors"], "MODEL: expected a float model file, got none"),
    ([], "MODEL: expected"),
    (["--inspect", "a", "b"], "--inspect: expected neither MODEL nor --output"),
    ([*MINIMAL, "--inspect", "a"], "--inspect: expected neither MODEL nor --output"),
    ([*MINIMAL, "--smoothquant", "1.5", "--calibration", "c"], "--smoothquant: expected a number of at least 0 and of"),
    ([*MINIMAL, "--smoothquant", "nan", "--calibration", "c"], "--smoothquant: expected a number"),
    ([*MINIMAL, "--percentile", "50", "--calibration", "c"], "--percentile: expected a number above 50"),
    ([*MINIMAL, "--batches", "0", "--calibration", "c"], "--batches: expected a whole number of at least 1, got 0"),
    ([*MINIMAL, "--seed", "-1", "--calibration", "c"], "--seed: expected a whole number of at least 0, got -1"),
    ([*MINIMAL, "--auto-keep-float", "-1", "--calibration", "c"], "--auto-keep-float: expected a number from 0 up"),
    ([*MINIMAL, "--auto-keep-float", "nan", "--calibration", "c"], "--auto-keep-float: expected a number from 0 up"),
])  # fmt: skip
def test_what_does_not_fit_is_an_error_that_names_the_flag(arguments, said):
    with pytest.raises(UsageError, match=f"^{said}"):
        parse(arguments)


@pytest.mark.parametrize("arguments", [["--scheme", "w4"], ["--weights", "per-row"], ["--ranges", "mean"],
                                       ["--batches", "x"], ["--smooth", "1"]])  # fmt: skip
def test_argparse_refuses_the_rest(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse([*MINIMAL, *arguments])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_help_shows_every_default():
    text = " ".join(quantizeoptions.build_parser().format_help().split())
    for words in ("default: w8a8-static", "default: 16", "default: 99.999", "default: minmax", "default: none"):
        assert words in text
