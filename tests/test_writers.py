"""The five formats byte for byte, and files that are whole or not there."""

import io
import math
import os
import sys
from pathlib import Path

import pytest

from minigate.errors import FileError, UsageError
from minigate.result import Result, Segment
from minigate.writers import FORMATS, Outputs, Writer, clock, output_stem, plan_outputs

SEGMENTS = [
    Segment(0, 0, 0.0, 2.5, " Hello there.", [50363, 18435, 612, 13, 50488], 0.0, -0.25, 1.1, 0.5),
    Segment(1, 0, 61.0005, 61.1, " a --> b\tc ", [], 0.2, -math.inf, math.nan, 0.0),
    Segment(2, 3000, 3599.9996, 7322.04, " zwölf", [7], 0.0, -0.5, 1.0, 0.0),
]
RESULT = Result(" Hello there. a --> b\tc  zwölf", SEGMENTS, "en")
EXPECTED = {
    "txt": "Hello there.\na --> b\tc\nzwölf\n",
    "srt": "1\n00:00:00,000 --> 00:00:02,500\nHello there.\n\n"
    "2\n00:01:01,000 --> 00:01:01,100\na -> b\tc\n\n"
    "3\n01:00:00,000 --> 02:02:02,040\nzwölf\n\n",
    "vtt": "WEBVTT\n\n00:00.000 --> 00:02.500\nHello there.\n\n"
    "01:01.000 --> 01:01.100\na -> b\tc\n\n"
    "01:00:00.000 --> 02:02:02.040\nzwölf\n\n",
    "tsv": "start\tend\ttext\n0\t2500\tHello there.\n61000\t61100\ta --> b c\n3600000\t7322040\tzwölf\n",
    "json": '{"text": " Hello there. a --> b\\tc  zw\\u00f6lf", "segments": ['
    '{"id": 0, "seek": 0, "start": 0.0, "end": 2.5, "text": " Hello there.", '
    '"tokens": [50363, 18435, 612, 13, 50488], "temperature": 0.0, "avg_logprob": -0.25, '
    '"compression_ratio": 1.1, "no_speech_prob": 0.5}, '
    '{"id": 1, "seek": 0, "start": 61.0005, "end": 61.1, "text": " a --> b\\tc ", '
    '"tokens": [], "temperature": 0.2, "avg_logprob": null, "compression_ratio": null, "no_speech_prob": 0.0}, '
    '{"id": 2, "seek": 3000, "start": 3599.9996, "end": 7322.04, "text": " zw\\u00f6lf", '
    '"tokens": [7], "temperature": 0.0, "avg_logprob": -0.5, "compression_ratio": 1.0, "no_speech_prob": 0.0}'
    '], "language": "en"}',
}


def write(outputs: Outputs, result: Result = RESULT):
    for segment in result.segments:
        outputs.segment(segment)
    outputs.end(result)


# --- formats


@pytest.mark.parametrize("format", FORMATS)
def test_format(format, tmp_path):
    with Outputs(format, tmp_path, "talk") as outputs:
        write(outputs)
    assert os.listdir(tmp_path) == [f"talk.{format}"]
    assert (tmp_path / f"talk.{format}").read_bytes().decode() == EXPECTED[format]


def test_all_formats(tmp_path):
    with Outputs("all", str(tmp_path), "talk.one") as outputs:
        write(outputs)
    written = {path.name: path.read_bytes().decode() for path in tmp_path.iterdir()}
    assert written == {f"talk.one.{format}": EXPECTED[format] for format in FORMATS}


def test_no_segments(tmp_path):
    with Outputs("all", tmp_path, "silence") as outputs:
        write(outputs, Result("", [], "en"))
    written = {path.suffix[1:]: path.read_text() for path in tmp_path.iterdir()}
    assert written == {
        "txt": "", "srt": "", "vtt": "WEBVTT\n\n", "tsv": "start\tend\ttext\n",
        "json": '{"text": "", "segments": [], "language": "en"}',
    }  # fmt: skip


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "00:00.000"),
        (0.0004, "00:00.000"),
        (59.9996, "01:00.000"),
        (3600.5, "01:00:00.500"),
        (36e4, "100:00:00.000"),
    ],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.mark.parametrize("seconds", [-0.01, math.nan, math.inf])
def test_clock_refuses_what_is_no_time(seconds):
    with pytest.raises(ValueError, match="seconds: expected a finite time of at least 0"):
        clock(seconds)


# --- standard output


@pytest.mark.parametrize("format", FORMATS)
def test_standard_output(format, capsys):
    with Outputs(format, None, "talk") as outputs:
        write(outputs)
    assert capsys.readouterr().out == EXPECTED[format] + "\n" * (format == "json")
    print("still open")


def test_standard_output_as_segments_are_found(capsys):
    with Outputs("srt", None, "talk") as outputs:
        outputs.segment(SEGMENTS[0])
        assert capsys.readouterr().out == EXPECTED["srt"].split("2\n00:01")[0]


def test_every_segment_is_flushed():
    raw = io.BytesIO()
    writer = Writer("txt", io.TextIOWrapper(raw, encoding="utf-8", write_through=False), "x")
    writer.segment(SEGMENTS[2])
    assert raw.getvalue().decode() == "zwölf\n"


def test_a_character_that_the_terminal_lacks_becomes_a_question_mark(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with Outputs("txt", None, "talk") as outputs:
        write(outputs)
    assert raw.getvalue() == b"Hello there.\na --> b\tc\nzw?lf\n"


# --- whole files or none


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_nothing_and_keeps_what_was_there(error, tmp_path):
    (tmp_path / "talk.txt").write_text("older")
    with pytest.raises(error), Outputs("all", tmp_path, "talk") as outputs:
        write(outputs)
        assert len(os.listdir(tmp_path)) == 6
        raise error
    assert os.listdir(tmp_path) == ["talk.txt"] and (tmp_path / "talk.txt").read_text() == "older"


def test_without_an_end_nothing_is_left(tmp_path):
    with Outputs("txt", tmp_path, "talk") as outputs:
        outputs.segment(SEGMENTS[0])
    assert os.listdir(tmp_path) == []


def test_an_interrupt_while_opening_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(writer):
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "begin", interrupt)
    with pytest.raises(KeyboardInterrupt), Outputs("all", tmp_path, "talk"):
        pass
    assert os.listdir(tmp_path) == []


def test_an_older_file_is_replaced(tmp_path):
    (tmp_path / "talk.txt").write_text("older")
    with Outputs("txt", tmp_path, "talk") as outputs:
        write(outputs)
    assert (tmp_path / "talk.txt").read_bytes().decode() == EXPECTED["txt"]


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileError, match=r"nowhere/talk.txt: expected a file that can be written, got No such file"):
        with Outputs("txt", tmp_path / "nowhere", "talk"):
            pass


def test_a_file_that_cannot_get_its_name(tmp_path):
    (tmp_path / "talk.txt").mkdir()
    with pytest.raises(FileError, match=r"talk.txt: expected a file that can be written, got"):
        with Outputs("txt", tmp_path, "talk") as outputs:
            write(outputs)
    assert os.listdir(tmp_path) == ["talk.txt"]


def refuse_vtt(monkeypatch, error):
    """os.replace fails for talk.vtt, the third of five; the others get their names."""
    replace = os.replace

    def some(source, target):
        if str(target).endswith("talk.vtt"):
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", some)


@pytest.mark.parametrize("error, raised", [
    (PermissionError(1, "Denied"), FileError), (KeyboardInterrupt(), KeyboardInterrupt)])  # fmt: skip
def test_one_file_that_cannot_get_its_name_takes_the_new_ones_along(error, raised, tmp_path, monkeypatch):
    refuse_vtt(monkeypatch, error)
    with pytest.raises(raised), Outputs("all", tmp_path, "talk") as outputs:
        write(outputs)
    assert os.listdir(tmp_path) == []


def test_files_that_replaced_older_ones_stay_and_are_named(tmp_path, monkeypatch):
    refuse_vtt(monkeypatch, PermissionError(1, "Denied"))
    for name in ("talk.txt", "talk.vtt", "talk.json"):
        (tmp_path / name).write_text("older")
    said = r"talk.vtt: expected .*got Denied; older files that are replaced already: \S*talk.txt$"
    with pytest.raises(FileError, match=said), Outputs("all", tmp_path, "talk") as outputs:
        write(outputs)
    assert {path.name: path.read_bytes().decode() for path in tmp_path.iterdir()} == {
        "talk.txt": EXPECTED["txt"], "talk.vtt": "older", "talk.json": "older"}  # fmt: skip


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")
def test_a_full_disk():
    with open("/dev/full", "w") as file:
        with pytest.raises(FileError, match="x.txt: expected a file that can be written, got No space left"):
            Writer("txt", file, "x.txt").segment(SEGMENTS[0])
        with pytest.raises(OSError):
            file.close()


def test_a_reader_that_has_gone_is_no_file_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    file = open(write_end, "w")
    with pytest.raises(BrokenPipeError):
        Writer("txt", file, "standard output").segment(SEGMENTS[0])
    with pytest.raises(BrokenPipeError):
        file.close()


# --- what the options get wrong


@pytest.mark.parametrize("path, stem", [("a/b.c.wav", "b.c"), ("-", "stdin"), ("x", "x"), ("/y/.hidden", ".hidden")])
def test_output_stem(path, stem):
    assert output_stem(path) == stem


def test_plan_makes_the_folder_and_names_the_stems(tmp_path):
    folder = tmp_path / "a" / "b"
    assert plan_outputs("all", folder, ["x/one.wav", "-"]) == ["one", "stdin"]
    assert folder.is_dir() and plan_outputs("txt", folder, []) == []
    assert plan_outputs("srt", None, ["x/one.wav", "y/one.mp3"]) == ["one", "one"]


def test_two_inputs_with_one_stem(tmp_path):
    with pytest.raises(UsageError, match=r"got x/one.wav and y/one.mp3, which both give one\.\*"):
        plan_outputs("txt", tmp_path / "new", ["x/one.wav", "two.wav", "y/one.mp3"])
    assert os.listdir(tmp_path) == []


def test_formats_that_are_refused(tmp_path):
    for make in (plan_outputs, Outputs):
        with pytest.raises(UsageError, match="--format: expected one of txt srt vtt tsv json all, got doc"):
            make("doc", tmp_path, "")
        with pytest.raises(UsageError, match="--format: expected --output-dir with all"):
            make("all", None, "")


def test_a_folder_that_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="--output-dir: expected a folder, got .*file"):
            plan_outputs("txt", wrong, ["a.wav"])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match="--output-dir: expected a folder that may be written to, got"):
        plan_outputs("txt", tmp_path, ["a.wav"])


def test_a_target_that_is_no_regular_file(tmp_path):
    (tmp_path / "one.vtt").mkdir()
    os.mkfifo(tmp_path / "two.srt")
    for inputs, got in ((["a/one.wav"], "one.vtt as a regular file, got a folder"),
                        (["x.wav", "two.wav"], "two.srt as a regular file, got a device or pipe")):  # fmt: skip
        with pytest.raises(UsageError, match=f"--output-dir: expected to write .*{got}"):
            plan_outputs("all", tmp_path, inputs)
    assert plan_outputs("txt", tmp_path, ["one.wav", "two.wav"]) == ["one", "two"]
