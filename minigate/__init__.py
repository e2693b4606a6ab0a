"""Whisper speech recognition in NumPy plus a small C extension, with gated attention and integer arithmetic.

model = minigate.load(); print(model.transcribe("talk.wav").text)
"""

from minigate.model import Model, load
from minigate.result import Result, Segment

__version__ = "0.1.0"
__all__ = ["Model", "Result", "Segment", "load"]
