"""What the command lines share: each error becomes one line on standard error and an exit code, never a traceback.

    def main(argv=None) -> int:
        return run_main(PROG, lambda: run(build_parser().parse_args(argv)))

Exit codes: 0 done, 1 a file, a stream or the memory failed, 2 wrong usage, 130 Ctrl-C, 141 when the reader of
standard output or standard error has gone.
"""

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress

from minigate.errors import FileError, UsageError

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
CLOSED_PIPE = 141  # 128 + SIGPIPE


def run_main(prog: str, run: Callable[[], int]) -> int:
    """run() -> its exit code, or that of its error, after one line on standard error that begins with prog.

    Warnings raised in run() take one line too. What argparse exits with (help, version, wrong arguments) is returned.
    """
    if sys.stderr is None:  # closed; print(file=None) would write to standard output
        sys.stderr = open(os.devnull, "w")
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *rest: say(prog, message, "warning")
        code = _answer(prog, run)
    return _flush(prog, code)


def _answer(prog: str, run: Callable[[], int]) -> int:
    try:
        return run()
    except SystemExit as stop:
        return stop.code or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return CLOSED_PIPE
    except UsageError as error:
        say(prog, error)
        return WRONG_USAGE
    except FileError as error:
        say(prog, error)
    except MemoryError as error:
        say(prog, no_memory(error))
    except OSError as error:
        say(prog, error if error.filename is None else f"{error.filename}: {error.strerror}")
    return FAILED


def _flush(prog: str, code: int) -> int:
    """Empty standard output here, since Python's own attempt at its end answers a failure with a traceback.

    -> code, or if that was 0 the failure's.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError) as error:  # ValueError: closed
        _give_up(sys.stdout)
        if code == 0 and not isinstance(error, BrokenPipeError):
            say(prog, f"standard output: expected a file that can be written, got {_reason(error)}")
        return code or (CLOSED_PIPE if isinstance(error, BrokenPipeError) else FAILED)
    return code


def say(prog: str, message: object, kind: str = "error") -> None:
    """One line on standard error, unless nobody is there to read it."""
    try:
        print(f"{prog}: {kind}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _give_up(sys.stderr)


def check_stdout() -> None:
    """FileError when there is no standard output, as after `>&-`: said before the work, not after."""
    if sys.stdout is None:
        raise FileError("standard output: expected an open stream, got a closed one")


def show(text: str) -> None:
    """Write a result and a line end to standard output; a character that its encoding lacks becomes a question mark.

    Raises FileError when it cannot be written, BrokenPipeError when its reader has gone.
    """
    check_stdout()
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FileError(f"standard output: expected a file that can be written, got {_reason(error)}") from error


@contextmanager
def memory_as_file_error(name: str):
    """A MemoryError raised inside becomes a FileError about the file `name`: it may be the only one that is too big."""
    try:
        yield
    except MemoryError as error:
        raise FileError(f"{name}: {no_memory(error)}") from None


def no_memory(error: MemoryError) -> str:
    return f"expected enough memory, got {str(error) or 'none left'}"


def _give_up(stream) -> None:
    """What the stream still holds goes nowhere, rather than into Python's last flush."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
