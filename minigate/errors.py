"""The two errors that the command line turns into one line and an exit code; ValueErrors for those who embed."""


class FileError(ValueError):
    """A file (audio, model, manifest) cannot be read or written as asked. Exit code 1."""


class UsageError(ValueError):
    """An argument is outside what it may be. Exit code 2."""
