"""Every option's range, in Python and on the command line, and what one window makes of them."""

import argparse
import dataclasses

import numpy as np
import pytest

from minigate.errors import UsageError
from minigate.options import (
    ArgumentParser,
    DecodingOptions,
    TranscribeOptions,
    add_decoding_arguments,
    decoding_options,
)

REFUSED = [
    ("language", ["klingon", 3, ""]), ("task", ["translation", None]), ("beam_size", [0, -1, 101, 2.0, True, "5"]),
    ("patience", [0, -1.0, float("nan"), float("inf"), None, "1", 0.4]), ("length_penalty", [-0.1, 1.1, float("nan")]),
    ("best_of", [0, 1.5, None]), ("temperature", [-0.1, float("nan"), (), None, (0, "x"), 1e-5, (0.0, float("inf"))]),
    ("compression_ratio_threshold", [-1, float("nan"), "2.4"]), ("logprob_threshold", [0.1, float("nan")]),
    ("no_speech_threshold", [-0.1, 1.1, float("nan"), True]), ("condition_on_previous_text", [1, "no"]),
    ("initial_prompt", [3, "\udc80"]), ("hotwords", [["a"], "\udc80"]), ("without_timestamps", ["no"]),
    ("suppress_tokens", ["x", "1,,2", [1.5], [-2], 7, [True, None]]),
]  # fmt: skip


@pytest.mark.parametrize("name, value", [(name, value) for name, values in REFUSED for value in values])
def test_what_is_refused(name, value):
    with pytest.raises(UsageError, match=f"^{name}: expected .*, got ") as error:
        TranscribeOptions(**{name: value})
    assert "\n" not in str(error.value)


def test_texts_at_once_have_a_bound():
    assert TranscribeOptions(beam_size=100, best_of=100).best_of == 100
    for name in ("beam_size", "best_of"):
        with pytest.raises(UsageError, match=f"^{name}: expected a whole number from 1 to 100, got 1000000$"):
            TranscribeOptions(**{name: 1000000})
    with pytest.raises(UsageError, match="^patience: expected .* finite"):
        TranscribeOptions(beam_size=100, patience=1e308)


def test_a_window_refuses_the_same():
    refused = [("temperature", (0, 1)), ("temperature", 1e-9), ("sample_len", 0), ("beam_size", 0), ("best_of", 101),
               ("max_initial_timestamp", -1.0), ("language", "klingon"), ("suppress_tokens", "x")]  # fmt: skip
    for name, value in refused:
        with pytest.raises(UsageError, match=f"^{name}: expected "):
            DecodingOptions(**{name: value})


def test_what_is_given_in_several_forms_is_put_into_one():
    options = TranscribeOptions(temperature=0, language="German", suppress_tokens="-1, 50")
    assert (options.temperature, options.language, options.suppress_tokens) == ((0.0,), "de", (-1, 50))
    assert TranscribeOptions(language="auto").language is None
    for nothing in ("", None, ()):
        assert TranscribeOptions(suppress_tokens=nothing).suppress_tokens == ()
    assert TranscribeOptions(suppress_tokens=np.array([3, 4])).suppress_tokens == (3, 4)
    assert TranscribeOptions(temperature=np.linspace(0, 1, 3)).temperature == (0.0, 0.5, 1.0)
    assert TranscribeOptions(beam_size=np.int64(3), length_penalty=0, no_speech_threshold=None).beam_size == 3


def test_a_window_takes_over_what_is_its():
    options = TranscribeOptions(beam_size=3, patience=2.0, best_of=4, length_penalty=0.5, suppress_tokens=[5],
                                without_timestamps=True, task="translate")  # fmt: skip
    window = options.window(0.5, [1, 2])
    assert (window.temperature, window.prompt) == (0.5, (1, 2))
    shared = {f.name for f in dataclasses.fields(DecodingOptions)} & {f.name for f in dataclasses.fields(options)}
    for name in shared - {"language", "temperature"}:
        assert getattr(window, name) == getattr(options, name)


def parse(*arguments, defaults=None):
    parser = ArgumentParser(prog="prog")
    add_decoding_arguments(parser, defaults)
    return decoding_options(parser.parse_args(arguments))


def test_flags_are_the_options():
    assert TranscribeOptions(**parse()) == TranscribeOptions()
    given = parse(
        "--language", "de", "--task", "translate", "--beam-size", "5", "--patience", "1.5", "--length-penalty", "0.6",
        "--best-of", "3", "--temperature", "0,0.5", "--compression-ratio-threshold", "3", "--logprob-threshold", "-2",
        "--no-speech-threshold", "none", "--no-condition-on-previous-text", "--initial-prompt", "Ab",
        "--hotwords", "Cd", "--suppress-tokens=-1,7", "--batch-size", "8", "--without-timestamps",
    )  # fmt: skip
    assert given == dict(
        language="de", task="translate", beam_size=5, patience=1.5, length_penalty=0.6, best_of=3,
        temperature=(0.0, 0.5), compression_ratio_threshold=3.0, logprob_threshold=-2.0, no_speech_threshold=None,
        condition_on_previous_text=False, initial_prompt="Ab", hotwords="Cd", suppress_tokens=(-1, 7),
        batch_size=8, without_timestamps=True,
    )  # fmt: skip
    assert given.keys() == {field.name for field in dataclasses.fields(TranscribeOptions)}


def test_defaults_can_differ():
    given = parse(defaults={"temperature": 0, "language": "en"})
    assert given["temperature"] == (0.0,) and given["language"] == "en"
    assert parse("--language", "auto", defaults={"language": "en"})["language"] is None


def test_help_names_every_default():
    parser = ArgumentParser(prog="prog")
    add_decoding_arguments(parser)
    text = parser.format_help()
    for action in parser._actions:
        assert isinstance(action, argparse._HelpAction) or "(default: " in action.help
    assert "0.0,0.2,0.4,0.6,0.8,1.0" in text and "(default: auto)" in text


@pytest.mark.parametrize("arguments", [
    ("--beam-size", "x"), ("--patience", "x"), ("--temperature", "0,"), ("--temperature", "x"), ("--task", "sing"),
    ("--logprob-threshold", "no"), ("--beam", "3"), ("--beam-size",), ("extra",),
])  # fmt: skip
def test_one_line_for_what_argparse_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(*arguments)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and err.startswith("prog: error: ") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [
    ("--beam-size", "0"), ("--temperature", "nan"), ("--temperature", "0,-0.5"), ("--length-penalty", "2"),
    ("--language", "klingon"), ("--suppress-tokens", "a"), ("--patience", "0.1"), ("--no-speech-threshold", "50"),
])  # fmt: skip
def test_what_is_out_of_range_names_the_flag(arguments):
    with pytest.raises(UsageError, match=f"^{arguments[0]}: expected .*, got "):
        parse(*arguments)
