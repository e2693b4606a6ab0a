"""Whisper speech recognition in NumPy plus a small C extension, with gated attention and integer arithmetic."""

__version__ = "0.1.0"
