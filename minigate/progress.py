"""Progress of long work on standard error: a bar on a terminal, a line now and then where that is a file or a pipe.

Without tqdm, which only a bare install lacks, there is none.
"""

import sys

PAUSE_S = (0.1, 10)  # least seconds from one look to the next: on a terminal, in a file


class Lines:
    """A stream for tqdm: each of its looks a line of its own, for files and for pipes that hold back half a line."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> None:
        text = text.strip("\r\n")
        if text.strip():
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


class Nothing:
    """What a bar can do, where there is none."""

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *exception):
        pass

    def update(self, n: int = 1) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass

    def close(self) -> None:
        pass


def bar(total: int, what: str, unit: str, done: int = 0, shown: bool = True):
    """A bar of tqdm's from `done` to `total` units; `Nothing` if it is not to be shown or there is nothing to do."""
    if not shown or not total:
        return Nothing()
    try:
        from tqdm import tqdm
    except ImportError:
        return Nothing()
    terminal = sys.stderr.isatty()
    pause_s = PAUSE_S[not terminal]
    return tqdm(total=total, initial=done, desc=what, unit=unit, file=sys.stderr if terminal else Lines(sys.stderr),
                dynamic_ncols=True, mininterval=pause_s, maxinterval=max(10, pause_s))  # fmt: skip


def say(text: str) -> None:
    """A line on standard error, above a bar that may be there."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(text, file=sys.stderr)
    else:
        tqdm.write(text, file=sys.stderr)
