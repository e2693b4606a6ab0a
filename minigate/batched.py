"""Several windows at a time: of one long recording, or of many, cut beforehand and decoded together.

    recordings --pieces--> at most 30 s each --encode and decode, batch_size at a time--> segments, in order

The encoder's and the decoder's weights are read once for all windows of a batch. The price: where a window ends is
settled before its text is known, at the quietest point of its last 5 s, and no window has the text before it as a
prompt. Before the last second of speech a text may not stop at the start of a segment, as Whisper does for a next
window to begin there (`rules.py`). Where it closes early and seconds follow in which somebody seems to speak, the rest
of its window is listened to again, once, with other rests; so is what is left where a text is as long as it can be.
What speech is, is judged by loudness alone: music may get more words than one window after the other gives it. The
initial prompt stands before each recording's windows, all of them. Where the language is to be detected, the first 30 s
of each recording are encoded once more, by themselves.

A model of variable context hears a piece's own length, so that only pieces of one length go together: they are taken
from the next few batches' worth.

Positions are mel frames of 0.01 s, times seconds.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minigate.decoding import DecodingResult, Own
from minigate.errors import FileError
from minigate.mel import HOP_LENGTH, N_FRAMES, SAMPLE_RATE
from minigate.options import TranscribeOptions
from minigate.result import Segment
from minigate.transcribe import (
    FRAMES_PER_POSITION,
    Transcription,
    context_frames,
    cut,
    decode_until_good,
    is_silence,
    prompt_tokens,
    segments_of,
    sound_s,
    text_tokens,
)

FRAMES_PER_S = SAMPLE_RATE // HOP_LENGTH
SEARCHED = 5 * FRAMES_PER_S  # frames at a window's end in which it may be cut
QUIET = FRAMES_PER_S // 5  # frames, 0.2 s, over which loudness is averaged
LEAST_REST = FRAMES_PER_S  # frames of speech without text at a window's end that are listened to again
LEAST_PASSED_OVER = 3 * FRAMES_PER_S  # the same where the text claims that nobody speaks in them
LEAST_VARIATION = 0.3  # of the mean log-mel around speech: 12 dB
AHEAD = 4  # batches' worth of pieces among which those of one length are looked for


class BatchedTranscription(Transcription):
    """A recording whose windows are cut beforehand; otherwise as its parent.

    `pieces` cuts, `take` is given what was decoded, in order; `by_window` does both for this recording alone.
    number: of the recording among those that are decoded together.
    """

    def __init__(self, model, audio, options: TranscribeOptions, number: int = 0):
        super().__init__(model, audio, options)
        self.number, self.taken = number, 0  # frames whose segments are found
        self._encoded = None  # what the language was heard in is encoded again, with others

    @property
    def done_s(self) -> float:
        return self.taken * HOP_LENGTH / SAMPLE_RATE

    def pieces(self) -> Iterator["Piece"]:
        """The recording, cut; `seek` is the next cut."""
        while not self.windows.ended(self.seek):
            seek = self.seek
            mel, n_frames = self.windows.window(seek)
            if n_frames == N_FRAMES and not self.windows.ended(seek + N_FRAMES, keep=seek):
                n_frames = quietest(mel)
                mel[:, n_frames:] = 0  # as behind a recording's end
            self.seek += n_frames
            yield Piece(self, seek, mel[:, : context_frames(self.model, n_frames)], n_frames)

    def take(self, piece: "Piece", found: DecodingResult) -> list[Segment]:
        """What was decoded of a piece -> its segments; none where nobody spoke."""
        self.taken = piece.seek + piece.n_frames
        if is_silence(found, self.options):
            return []
        whole_s = piece.n_frames * HOP_LENGTH / SAMPLE_RATE
        parts = [(0.0, whole_s, found.tokens)]
        if not self.options.without_timestamps:
            parts, _ = self.cut(piece, found)
        segments = segments_of(self.model.tokenizer, found, parts, piece.seek, len(self.segments))
        self.segments += segments
        return segments

    def cut(self, piece: "Piece", found: DecodingResult) -> tuple[list[tuple[float, float, list[int]]], int]:
        return cut_whole(found.tokens, self.model.tokenizer.timestamp_begin, piece.n_frames, FRAMES_PER_POSITION)

    def rest(self, piece: "Piece", found: DecodingResult) -> "Piece | None":
        """What of a piece its text does not speak for, though somebody seems to speak; None where that is little."""
        if self.options.without_timestamps or is_silence(found, self.options) or not found.text:
            return None
        advance, least = self.cut(piece, found)[1], LEAST_REST
        last = (found.tokens[-1] - self.model.tokenizer.timestamp_begin) * FRAMES_PER_POSITION
        if last >= 0 and (advance == piece.n_frames or last >= piece.whole_s * FRAMES_PER_S):
            advance, least = min(advance, last), LEAST_PASSED_OVER  # it claims that nobody speaks after that
            if piece.is_rest or piece.speech[advance:].sum() < LEAST_REST:
                return None
        if advance < LEAST_REST or piece.speech_end - advance < least:
            return None
        n_frames = piece.n_frames - advance
        mel = np.zeros((len(piece.mel), N_FRAMES), np.float32)
        mel[:, :n_frames] = piece.mel[:, advance : piece.n_frames]
        return Piece(self, piece.seek + advance, mel[:, : context_frames(self.model, n_frames)], n_frames, True)

    def by_window(self) -> Iterator[list[Segment]]:
        for _, segments in decode_pieces(self.pieces(), self.options.batch_size):
            yield segments


@dataclass(frozen=True)
class Piece:
    """A window of a recording: mel (n_mels, frames that the encoder hears), frames of content."""

    transcription: BatchedTranscription
    seek: int
    mel: np.ndarray
    n_frames: int
    is_rest: bool = False  # of another piece

    @cached_property
    def speech(self) -> np.ndarray:
        """(n,) bool: whether somebody may speak in the 0.2 s from frame i on. They are louder than the quietest of the
        content by more than a quarter of what the loudest are, and loudness varies within a second of them, unlike
        that of steady noise; music passes."""
        heard = loudness(self.mel[:, : self.n_frames])
        if not len(heard):
            return np.zeros(0, bool)
        around = np.pad(heard, FRAMES_PER_S, mode="edge")
        around = np.lib.stride_tricks.sliding_window_view(around, 2 * FRAMES_PER_S + 1)
        varies = around.max(axis=1) - around.min(axis=1) >= LEAST_VARIATION * QUIET
        return varies & (heard > heard.min() + (heard.max() - heard.min()) / 4)

    @property
    def speech_end(self) -> int:
        """The frame up to which somebody may speak."""
        last = np.flatnonzero(self.speech)[-1:]
        return int(last[0]) + QUIET if len(last) else 0

    @property
    def whole_s(self) -> float:
        """Seconds before which a segment that has begun is worth its words."""
        return max(0, self.speech_end - LEAST_REST) / FRAMES_PER_S


def loudness(mel: np.ndarray) -> np.ndarray:
    """mel (n_mels, T) -> (T - QUIET + 1,): sums over 0.2 s, frames i to i + QUIET, of the mean log-mel of a frame."""
    sums = np.concatenate([[0.0], mel.mean(axis=0, dtype=np.float64).cumsum()])
    return (sums[QUIET:] - sums[:-QUIET]).round(6)


def quietest(mel: np.ndarray) -> int:
    """mel (n_mels, 3000) -> the frame of its last 5 s, the last of equals, around which 0.2 s are the quietest."""
    around = loudness(mel[:, N_FRAMES - SEARCHED - QUIET // 2 :])
    return N_FRAMES - SEARCHED + len(around) - 1 - int(around[::-1].argmin())


def cut_whole(tokens: list[int], timestamp_begin: int, n_frames: int, frames_per_step: int
              ) -> tuple[list[tuple[float, float, list[int]]], int]:  # fmt: skip
    """As `transcribe.cut`, but text that follows the last pair of timestamps is a segment too, up to the window's end:
    the next window begins after it. -> segments, the frames that they speak for."""
    parts, advance = cut(tokens, timestamp_begin, n_frames, frames_per_step)
    rest = tokens[sum(len(part) for _, _, part in parts) :]
    if any(token < timestamp_begin for token in rest):
        start_s = (rest[0] - timestamp_begin) * frames_per_step * HOP_LENGTH / SAMPLE_RATE
        parts.append((start_s, max(start_s, n_frames * HOP_LENGTH / SAMPLE_RATE), rest))
        advance = n_frames
    return parts, advance


@dataclass(frozen=True)
class Found:
    """Something about recording `number`: opened (no segments yet), a window's segments, or its end (None)."""

    number: int
    transcription: BatchedTranscription | None  # None: it could not be opened
    segments: list[Segment] | None
    error: FileError | None = None  # that ended it


def transcribe_all(model, sources: Iterable, options: TranscribeOptions) -> Iterator[Found]:
    """Recordings (as `Transcription` takes them), decoded across their borders -> what is found, in their order."""

    def items() -> Iterator[Piece | Found]:
        for number, source in enumerate(sources):
            transcription = None
            try:
                transcription = BatchedTranscription(model, source, options, number)
                yield Found(number, transcription, [])
                yield from transcription.pieces()
                yield Found(number, transcription, None)
            except FileError as error:
                yield Found(number, transcription, None, error)

    for item, segments in decode_pieces(items(), options.batch_size):
        is_piece = isinstance(item, Piece)
        yield Found(item.transcription.number, item.transcription, segments) if is_piece else item


class Together:
    """`transcribe_all`, one recording after the other."""

    def __init__(self, model, sources: Iterable, options: TranscribeOptions):
        self._recordings = itertools.groupby(transcribe_all(model, sources, options), lambda found: found.number)

    def next(self, name: str) -> tuple[BatchedTranscription, Iterator[list[Segment]]]:
        """-> the next recording and the segments of each of its windows, which raise FileError where it ends badly.

        Raises FileError when it cannot be opened, or is lost because decoding ended before its turn.
        """
        group = next(self._recordings, None)
        if group is None:
            raise FileError(f"{name}: not transcribed, since a batch before it failed; a smaller --batch-size may help")
        opened = next(group[1])
        if opened.error:
            raise opened.error
        return opened.transcription, self._segments(group[1])

    @staticmethod
    def _segments(rest: Iterator[Found]) -> Iterator[list[Segment]]:
        for found in rest:
            if found.error:
                raise found.error
            if found.segments is not None:
                yield found.segments


def decode_pieces(items: Iterable, batch_size: int) -> Iterator[tuple[object, list[Segment] | None]]:
    """Pieces -> each with its segments, in the same order; anything else among them passes through, with None."""
    waiting, ended_by = [], None
    items = iter(items)
    while True:
        try:
            item = next(items)
        except StopIteration:
            break
        except FileError as error:  # what was read before it counts
            ended_by = error
            break
        waiting.append(item)
        pieces = [each for each in waiting if isinstance(each, Piece)]
        full = len(pieces) == AHEAD * batch_size or len(pieces) == batch_size and len(set(map(_kind, pieces))) == 1
        if full or not pieces:
            yield from _decode_all(waiting, batch_size)
            waiting = []
    yield from _decode_all(waiting, batch_size)
    if ended_by:
        raise ended_by


def _kind(piece: Piece) -> int:
    """What pieces that are decoded together have in common."""
    return piece.mel.shape[1]


def _decode_all(items: list, batch_size: int) -> Iterator[tuple[object, list[Segment] | None]]:
    found = [[] for _ in items]  # of each piece, with its rests: (piece, result) one after the other
    pieces = {i: item for i, item in enumerate(items) if isinstance(item, Piece)}
    while pieces:
        results = _decode_by_kind(list(pieces.values()), batch_size)
        rests = {}
        for (i, piece), result in zip(pieces.items(), results, strict=True):
            found[i].append((piece, result))
            rests[i] = piece.transcription.rest(piece, result)
        pieces = {i: rest for i, rest in rests.items() if rest is not None}
    for item, parts in zip(items, found, strict=True):
        if isinstance(item, Piece):
            yield item, [s for piece, result in parts for s in item.transcription.take(piece, result)]
        else:
            yield item, None


def _decode_by_kind(pieces: list[Piece], batch_size: int) -> list[DecodingResult]:
    kinds: dict[int, list[int]] = {}
    for i, piece in enumerate(pieces):
        kinds.setdefault(_kind(piece), []).append(i)
    results: list[DecodingResult | None] = [None] * len(pieces)
    for alike in kinds.values():
        for start in range(0, len(alike), batch_size):
            some = alike[start : start + batch_size]
            for i, result in zip(some, _decode([pieces[i] for i in some]), strict=True):
                results[i] = result
    return results


def _decode(pieces: list[Piece]) -> list[DecodingResult]:
    """Pieces of one kind, together."""
    model, options = pieces[0].transcription.model, pieces[0].transcription.options
    prompt = prompt_tokens(model, options, text_tokens(model, options.initial_prompt))
    own = [Own(p.transcription.language, sound_s(p.n_frames, p.mel.shape[1]), (p.seek,), p.whole_s) for p in pieces]
    return decode_until_good(model, model.encode(np.stack([p.mel for p in pieces])), options, prompt, own)
