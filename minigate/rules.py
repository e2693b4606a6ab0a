"""Which tokens may come next: logits (rows, V) and the tokens decoded so far (rows, n) -> the likeliest allowed ones,
and the same logits with forbidden ones at minus infinity.

The rules are openai/whisper's: some tokens are never decoded, a text does not begin with a blank, and timestamps come
in pairs that do not run backwards, or singly before the end. Two are ours. Where the model hears no silence after the
sound (variable context), no segment begins when the sound is over, which would be heard as another one saying it all
again. Where no window begins with what another one has left unfinished (they are cut beforehand), a text does not end
at the start of a segment, as Whisper was trained to end where the window cuts one off, unless too little follows.

V n_vocab.  Timestamps are the last ids of the vocabulary: `timestamp_begin` is 0.00 s, each further id 0.02 s more.
"""

import math
from collections.abc import Sequence

import numpy as np

from minigate.choice_kernels import Choice, choose
from minigate.errors import UsageError
from minigate.options import MODEL_SUPPRESS_SET, DecodingOptions

CHUNK_S = 30  # seconds of sound in a window
SHORTEST_SEGMENT_S = 0.2  # seconds; what begins so late in the sound is none


def suppressed_tokens(model, chosen: tuple[int, ...]) -> np.ndarray:
    """The ids that are never decoded: the `chosen` ones and every token that only opens or steers a text (those also
    when nothing is chosen, where openai/whisper lets them through).

    -1 among `chosen` stands for the model's own list, or Whisper's non-speech symbols when it has none. Raises
    UsageError for the id of a timestamp or one outside the vocabulary.
    """
    tokenizer = model.tokenizer
    ids = {token for token in chosen if token != MODEL_SUPPRESS_SET}
    if ids and max(ids) >= tokenizer.timestamp_begin:
        raise UsageError(f"suppress_tokens: expected ids below {tokenizer.timestamp_begin}, the first timestamp, "
                         f"got {max(ids)}")
    if MODEL_SUPPRESS_SET in chosen:
        own = model.metadata.get("suppress_tokens")
        ids.update(tokenizer.non_speech_tokens if own is None else own)
    ids.update((tokenizer.transcribe, tokenizer.translate, tokenizer.sot, tokenizer.sot_prev, tokenizer.sot_lm))
    ids.add(tokenizer.no_speech)  # its probability is read where the text starts
    return np.array(sorted(ids), np.int64)


class Rules:
    """The rules for one model and one choice of options; of what was decoded they remember nothing.

    sounds: of each row, the seconds of its sound, or None where silence is heard after it; none are given where it is
    heard after all. wholes: of each row, the seconds before which a segment that has begun has words; none are given
    where each may be left to another window.
    """

    def __init__(self, model, options: DecodingOptions, sounds: Sequence[float | None] = (),
                 wholes: Sequence[float] = ()):  # fmt: skip
        tokenizer = model.tokenizer
        self.eot = tokenizer.eot
        self.timestamp_begin = tokenizer.timestamp_begin
        self.timestamps = not options.without_timestamps
        self.never = suppressed_tokens(model, options.suppress_tokens)
        not_first = [tokenizer.vocabulary.index(b" "), self.eot] if options.suppress_blank else []
        self.max_initial = self.max_start = None  # the latest timestamps; max_start (rows,)
        self.whole = None  # (rows,) the first timestamp that may end a text as a start
        if self.timestamps:
            self.never = np.union1d(self.never, tokenizer.no_timestamps)
            precision_s = CHUNK_S / model.dims.n_audio_ctx  # 0.02
            if options.max_initial_timestamp is not None:
                self.max_initial = self.timestamp_begin + round(options.max_initial_timestamp / precision_s)
            if any(sound_s is not None for sound_s in sounds):
                latest_s = [CHUNK_S if s is None else max(0.0, s - SHORTEST_SEGMENT_S) for s in sounds]
                self.max_start = np.array([self.timestamp_begin + int(s / precision_s) for s in latest_s])
            if any(wholes):
                self.whole = np.array([self.timestamp_begin + math.ceil(round(s / precision_s, 6)) for s in wholes])
        self.never_first = np.union1d(self.never, np.array(not_first, np.int64))  # nor does a text begin with a blank

    def keep(self, rows: np.ndarray) -> None:
        """Go on with these rows only, indices into those of now."""
        if self.max_start is not None:
            self.max_start = self.max_start[rows]
        if self.whole is not None:
            self.whole = self.whole[rows]

    def choose(self, logits: np.ndarray, tokens: np.ndarray, k: int = 1) -> Choice:
        """logits (rows, V) float32, forbidden ones changed to -inf in place; tokens (rows, n): what was decoded so far,
        n >= 0 -> the k likeliest of each row.

        Where all timestamps together are likelier than the likeliest other token, it is one of them."""
        first, n_vocab = tokens.shape[1] == 0, logits.shape[1]
        ranges = np.empty((len(logits), 4), np.int64)  # what is allowed below timestamp_begin, and from it on
        ranges[:] = (0, self.timestamp_begin, self.timestamp_begin, n_vocab)
        if self.timestamps and first:
            self._first(ranges)
        elif self.timestamps:
            self._pairs(ranges, tokens)
        never = self.never_first if first else self.never
        return choose(logits, never, ranges, self.timestamp_begin, self.timestamps, k)

    def _first(self, ranges: np.ndarray) -> None:
        """The first token is a timestamp, not too late."""
        ranges[:, 1] = 0
        if self.max_initial is not None:
            ranges[:, 3] = np.minimum(ranges[:, 3], self.max_initial + 1)
        self._begin_in_sound(ranges, slice(None))

    def _pairs(self, ranges: np.ndarray, tokens: np.ndarray) -> None:
        """A start is followed by text, an end by a start or the end of the text, and none runs backwards.

        The start that follows an end may be the same instant; an end is later than its start, so that every segment
        has a length and the window after it begins further on.
        """
        begin = self.timestamp_begin
        last = tokens[:, -1] >= begin
        before = tokens[:, -2] >= begin if tokens.shape[1] > 1 else np.ones_like(last)
        closed = last & ~before
        latest = tokens.max(axis=1)  # timestamps are the largest ids and do not decrease
        earliest = np.where(latest >= begin, latest + ~closed, begin)
        ranges[:, 2] = np.minimum(earliest, ranges[:, 3])
        ranges[last & before, 2] = ranges[0, 3]  # a start was the last token: no timestamp at all
        if self.whole is not None and tokens.shape[1] > 1:  # a text without any words may end
            ranges[last & before & (latest < self.whole), 1] = self.eot
        ranges[closed, 0] = self.eot
        self._begin_in_sound(ranges, closed)

    def _begin_in_sound(self, ranges: np.ndarray, rows) -> None:
        """In these rows a segment may begin, if there is sound left for it."""
        if self.max_start is not None:
            ranges[rows, 3] = np.minimum(ranges[rows, 3], self.max_start[rows] + 1)
            ranges[:, 2] = np.minimum(ranges[:, 2], ranges[:, 3])
