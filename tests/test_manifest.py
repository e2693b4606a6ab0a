"""Reading manifests: what is accepted, and one line naming line and column for everything else."""

from __future__ import annotations

import pytest

from minigate.errors import FileError
from minigate.manifest import read_manifest


def write(folder, content):
    path = folder / "list.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_columns_in_any_order_with_others_between(tmp_path):
    rows = read_manifest(write(tmp_path, "seconds\tsource\tpath\tnote\tspeaker\ttext\n"
                                         "1.5\tcorpus\ta/b.wav\tx\tmary\tSay \"no\".\n"
                                         "2\t\tc.flac\t\t\t\n"))
    assert [(r.name, r.text, r.speaker, r.source, r.line) for r in rows] == [
        ("a/b.wav", 'Say "no".', "mary", "corpus", 2), ("c.flac", None, "", "", 3)]
    assert rows[0].file == tmp_path / "a" / "b.wav"


def test_path_alone_and_absolute_path(tmp_path):
    rows = read_manifest(write(tmp_path, f"path\n{tmp_path}/x.wav\n"))
    assert rows[0].file == tmp_path / "x.wav" and rows[0].name == f"{tmp_path}/x.wav" and rows[0].text is None


def test_line_ends_byte_order_mark_blank_lines_and_odd_separators(tmp_path):
    """U+2028 and U+0085 belong to the text; line numbers count blank lines."""
    content = "\ufeffpath\ttext\r\n\r\na.wav\tone\u2028two\u0085three\r\n  \r\nb.wav\tfour"
    assert [(r.name, r.text, r.line) for r in read_manifest(write(tmp_path, content))] == [
        ("a.wav", "one\u2028two\u0085three", 3), ("b.wav", "four", 5)]


@pytest.mark.parametrize("content, said", [
    ("", "expected a header line with a column 'path', got an empty file"),
    ("\n\n", "expected a header line"),
    ("file\ttext\na\tb\n", "line 1: expected tab-separated column names with 'path' among them, got 'file text'"),
    ("path,text\na,b\n", "line 1: expected tab-separated"),
    ("path\ttext\ttext\na\tb\tc\n", "line 1, column text: expected it once, got it 2 times"),
    ("path\ttext\n", "expected at least one row below the header, got none"),
    ("path\ttext\na.wav\n", "line 2, column text: expected 2 tab-separated fields like the header, got 1"),
    ("path\ttext\na.wav\tb\tc\n", "line 2, column 3: expected 2 tab-separated fields like the header, got 3"),
    ("path\ttext\na.wav\tb\n\t\n", "line 3, column path: expected the path of a recording, got ''"),
    ("path\n-\n", "line 2, column path: expected the path of a recording, got '-'"),
    ("path\ttext\na\0.wav\tb\n", r"line 2, column path: expected the path of a recording, got 'a\x00.wav'"),
    ("path\na.wav\nb.wav\na.wav\n", "line 4, column path: expected each recording once, got 'a.wav' of line 2 again"),
    (b"path\ttext\na.wav\tcaf\xe9\n", "line 2, column 2: expected UTF-8, got byte 0xe9"),
    (b"RIFF\xff\xff", "line 1, column 1: expected UTF-8, got byte 0xff"),
])
def test_bad_manifests(tmp_path, content, said):
    with pytest.raises(FileError) as error:
        read_manifest(write(tmp_path, content))
    assert said in str(error.value) and "list.tsv" in str(error.value) and "\n" not in str(error.value)


def test_unreadable_manifest(tmp_path):
    for path in (tmp_path / "none.tsv", tmp_path):
        with pytest.raises(FileError, match="expected a readable manifest, got"):
            read_manifest(path)
