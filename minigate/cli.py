"""`python -m minigate.transcribe FILE...`: recordings -> text on standard output, or files in a folder.

Standard output carries the result and nothing else; progress, warnings and errors go to standard error. Exit codes:
0 done, 1 a file could not be read or written (the others are done all the same), 2 wrong usage, 130 Ctrl-C, 141 when
the reader of standard output has gone.
"""

import sys
import warnings
from argparse import Namespace
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress

from minigate import __version__
from minigate.batched import Together
from minigate.command import FAILED, check_stdout, memory_as_file_error, run_main, say
from minigate.errors import FileError
from minigate.languages import LANGUAGES
from minigate.model import load
from minigate.options import (
    ArgumentParser,
    TranscribeOptions,
    add_decoding_arguments,
    decoding_options,
    errors_name_flags,
)
from minigate.result import Segment
from minigate.transcribe import Transcription, check_options
from minigate.writers import FORMATS, Outputs, plan_outputs

PROG = "python -m minigate.transcribe"


def build_parser() -> ArgumentParser:
    """The command line of `python -m minigate.transcribe`."""
    parser = ArgumentParser(prog=PROG, description="Transcribe recordings. The text goes to standard output as it is "
                            "found, everything else to standard error.")
    parser.add_argument("files", nargs="+", metavar="FILE",
                        help="recording (wav, flac, ogg, opus, mp3; others through ffmpeg), or - for raw 16 kHz mono "
                             "16-bit little-endian PCM from standard input, which is clamped with the running maximum: "
                             "its text can differ slightly from the same file's")
    parser.add_argument("--model", metavar="NAME_OR_PATH",
                        help="model file, or name of an embedded model (default: the embedded tiny.en, int8)")
    parser.add_argument("--format", choices=(*FORMATS, "all"), default="txt",
                        help="txt, srt, vtt, tsv, json; all needs --output-dir (default: txt)")
    parser.add_argument("--output-dir", metavar="FOLDER",
                        help="write NAME.FORMAT for each recording there, made if need be (default: standard output)")
    parser.add_argument("--threads", type=int, metavar="N",
                        help="threads to compute with (default: the cores this process may use)")
    parser.add_argument("--quiet", action="store_true", help="no progress and no warnings (default: both)")
    parser.add_argument("--version", action="version", version=f"minigate {__version__}")
    add_decoding_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Arguments (default: the command line's) -> exit code, after one line on standard error if that is not 0."""
    return run_main(PROG, lambda: run(build_parser().parse_args(argv)))


def run(args: Namespace) -> int:
    """Parsed arguments -> exit code 0, or 1 when a recording failed. Raises UsageError, and FileError for the model."""
    if args.quiet:
        warnings.simplefilter("ignore", UserWarning)
    options = TranscribeOptions(**decoding_options(args))
    if args.output_dir is None:
        check_stdout()
    stems = plan_outputs(args.format, args.output_dir, args.files)
    with errors_name_flags():
        model = load(args.model, args.threads)
        check_options(model, options)
    code, together = 0, Together(model, args.files, options) if options.batch_size > 1 else None
    for path, stem in zip(args.files, stems, strict=True):
        try:
            with memory_as_file_error(path):
                if together:
                    transcription, found = together.next(path)
                else:
                    transcription = Transcription(model, path, options)
                    found = transcription.by_window()
                write_file(path, transcription, found, Outputs(args.format, args.output_dir, stem), args.quiet)
        except FileError as error:
            say(PROG, error)
            code = FAILED
    return code


def write_file(path: str, transcription: Transcription, found: Iterable[list[Segment]], outputs: Outputs,
               quiet: bool) -> None:  # fmt: skip
    """Write the segments of one recording as they are found. Raises FileError."""
    probs = transcription.language_probs
    if probs and not quiet:
        language = transcription.language
        print(f"{path}: language {language}, {LANGUAGES[language]} ({probs[language]:.0%})", file=sys.stderr)
    with outputs, Progress(path, transcription.duration_s, quiet) as progress:
        for segments in found:
            with progress.aside():
                for segment in segments:
                    outputs.segment(segment)
            progress.show(transcription.done_s)
        outputs.end(transcription.result())


class Progress:
    """A bar on standard error: only on a terminal, where tqdm is installed, and unless it is to be quiet."""

    def __init__(self, name: str, duration_s: float | None, quiet: bool):
        self.bar = None
        if quiet or not sys.stderr.isatty():
            return
        with suppress(ImportError):
            from tqdm import tqdm

            known = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]"
            form = known if duration_s else "{desc}: {n:.0f} s [{elapsed}]"
            self.bar = tqdm(desc=name, total=duration_s, bar_format=form, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()

    def aside(self) -> AbstractContextManager:
        """While standard output is written to: the bar is out of the way."""
        return nullcontext() if self.bar is None else self.bar.external_write_mode(file=sys.stdout)

    def show(self, done_s: float) -> None:
        if self.bar is not None:
            self.bar.n = done_s
            self.bar.refresh()
