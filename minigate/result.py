"""What a transcription is: segments in the order in which they were spoken, their text joined, and the language.

The fields and the order of the JSON keys are openai/whisper's (`transcribe()` returns the same as nested dicts), so
that a program that reads its JSON reads ours.
"""

import math
from dataclasses import dataclass


@dataclass
class Segment:
    """A stretch of speech between two timestamps (or one whole window, without timestamps)."""

    id: int  # 0, 1, 2 … within the recording
    seek: int  # first mel frame of the 30 s window in which it was found, 10 ms a frame
    start: float  # seconds from the recording's beginning
    end: float  # seconds
    text: str  # usually starts with a space
    tokens: list[int]  # as decoded, timestamp tokens included
    temperature: float  # at which the window was accepted
    avg_logprob: float  # of the window: sum of log-probabilities / (tokens + 1)
    compression_ratio: float  # of the window's text: UTF-8 bytes / zlib bytes
    no_speech_prob: float  # of the window: probability of <|nospeech|> right after <|startoftranscript|>

    def to_dict(self) -> dict:
        """Plain int, float, str and list for json.dump; NaN and infinity, which JSON has no word for, become None."""
        return {
            "id": int(self.id),
            "seek": int(self.seek),
            "start": _finite(self.start),
            "end": _finite(self.end),
            "text": self.text,
            "tokens": [int(token) for token in self.tokens],
            "temperature": _finite(self.temperature),
            "avg_logprob": _finite(self.avg_logprob),
            "compression_ratio": _finite(self.compression_ratio),
            "no_speech_prob": _finite(self.no_speech_prob),
        }


@dataclass
class Result:
    """One recording: `text` is all segments' text in one string, `language` a code such as "en"."""

    text: str
    segments: list[Segment]
    language: str

    def to_dict(self) -> dict:
        """text, segments and language as json.dump takes them; see Segment.to_dict."""
        return {
            "text": self.text,
            "segments": [segment.to_dict() for segment in self.segments],
            "language": self.language,
        }


def _finite(number) -> float | None:
    number = float(number)
    return number if math.isfinite(number) else None
