"""A recording of any length -> segments, window by window, as openai/whisper's `transcribe` finds them.

A window is 30 s of log-mel from frame `seek` on. Its text is decoded, at a higher temperature again when it looks
failed, and cut into segments at its timestamps; the next window begins where the last complete segment ended.

    transcribe(model, "speech.wav", language="en", beam_size=5) -> Result
    for segment in Transcription(model, "speech.wav", TranscribeOptions()): ...   # as they are found

Positions within a window are in timestamp steps of 0.02 s, `seek` in mel frames of 0.01 s, times in seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace

import numpy as np

from minigate import kernels
from minigate.decoding import DecodingResult, Own, decode, detect_language
from minigate.errors import FileError, UsageError
from minigate.mel import HOP_LENGTH, N_FRAMES, SAMPLE_RATE, MelWindows
from minigate.options import TranscribeOptions
from minigate.result import Result, Segment
from minigate.rules import suppressed_tokens

FRAMES_PER_POSITION = 2  # of mel per position of the encoder, and per step of a timestamp
VARIABLE_STEP = SAMPLE_RATE // HOP_LENGTH  # mel frames, 1 s: to which a variable context is rounded up
LEAST_TEXT_CTX = 16  # positions of the decoder: the opening and a few words
RELIABLE_TEMPERATURE = 0.5  # text decoded at a higher one is no prompt for what follows


def transcribe(
    model,
    audio,
    *,
    on_segment: Callable[[Segment], None] | None = None,
    on_progress: Callable[[float, float | None], None] | None = None,
    **options,
) -> Result:
    """A path, '-' (raw 16 kHz s16le PCM on standard input) or an array (16 kHz mono, float32 within ±1) -> Result.

    options: the fields of TranscribeOptions, the command line's flags with underscores. on_segment is called with each
    segment as it is found, on_progress after each window with the seconds done and those in all (None: not yet known).
    Raises UsageError for an option, FileError for the recording.
    """
    unknown = options.keys() - {field.name for field in fields(TranscribeOptions)}
    if unknown:
        names = ", ".join(field.name for field in fields(TranscribeOptions))
        raise UsageError(f"options: expected some of {names}, got {', '.join(sorted(unknown))}")
    checked = TranscribeOptions(**options)
    if checked.batch_size > 1:
        from minigate.batched import BatchedTranscription  # which is made of what is below

        transcription = BatchedTranscription(model, audio, checked)
    else:
        transcription = Transcription(model, audio, checked)
    for segments in transcription.by_window():
        for segment in segments if on_segment else ():
            on_segment(segment)
        if on_progress:
            on_progress(transcription.done_s, transcription.duration_s)
    return transcription.result()


def check_options(model, options: TranscribeOptions) -> None:
    """Raise UsageError for what this model cannot do: a language or task it was not trained on, tokens it lacks; and
    FileError for a model that no recording fits."""
    n_audio, n_text = model.dims.n_audio_ctx, model.dims.n_text_ctx
    if n_audio != N_FRAMES // FRAMES_PER_POSITION or n_text < LEAST_TEXT_CTX:
        wanted = f"n_audio_ctx {N_FRAMES // FRAMES_PER_POSITION} and n_text_ctx of at least {LEAST_TEXT_CTX}"
        raise FileError(f"model: expected {wanted}, got {n_audio} and {n_text}")
    language = options.language or model.tokenizer.all_language_codes[0]
    model.tokenizer.sot_sequence(language, options.task)
    suppressed_tokens(model, options.suppress_tokens)


def context_frames(model, n_frames: int) -> int:
    """Mel frames that the encoder is given for so many of content: all 3000, or, where the model was trained so, the
    content's whole seconds, rounded up, 2 at least."""
    if model.metadata.get("audio_context") != "variable":
        return N_FRAMES
    return min(N_FRAMES, VARIABLE_STEP * max(2, -(-n_frames // VARIABLE_STEP)))


class Transcription:
    """The segments of one recording, found as one iterates, once; afterwards `result()`.

    language        code, given or detected in the first 30 s
    language_probs  by code, where it was detected
    done_s          seconds of the recording behind us
    duration_s      seconds in all; None while standard input has not ended
    """

    def __init__(self, model, audio, options: TranscribeOptions):
        check_options(model, options)
        self.model, self.options = model, options
        self.windows = MelWindows(audio, model.dims.n_mels)
        self.seek = 0
        self.segments: list[Segment] = []
        self.language_probs: dict[str, float] | None = None
        self._encoded: tuple[np.ndarray, np.ndarray] | None = None  # mel, xa of what the language was heard in
        self.language = self._language()
        self._previous = text_tokens(model, options.initial_prompt)  # text before the next window
        conditioned = options.condition_on_previous_text
        self._conditioned = model.knows_prompts if conditioned is None else conditioned

    @property
    def done_s(self) -> float:
        done_s = self.seek * HOP_LENGTH / SAMPLE_RATE
        return done_s if self.duration_s is None else min(done_s, self.duration_s)

    @property
    def duration_s(self) -> float | None:
        return self.windows.duration_s

    def __iter__(self) -> Iterator[Segment]:
        for segments in self.by_window():
            yield from segments

    def by_window(self) -> Iterator[list[Segment]]:
        """The segments of one window after the other; none where nobody spoke."""
        while not self.windows.ended(self.seek):
            segments = self._window()
            self.segments += segments
            yield segments

    def result(self) -> Result:
        """All segments so far, and their text: that of their tokens together, since a character may span two."""
        tokens = [token for segment in self.segments for token in segment.tokens]
        return Result(self.model.tokenizer.decode(tokens), self.segments, self.language)

    def _language(self) -> str:
        if self.options.language is not None or not self.model.is_multilingual:
            return self.model.tokenizer.language_code(self.options.language)
        mel = self.windows.language_window()
        self._encoded = mel, self.model.encode(mel[None])
        [self.language_probs] = detect_language(self.model, self._encoded[1])
        return max(self.language_probs, key=self.language_probs.get)

    def _listen(self, mel: np.ndarray) -> np.ndarray:
        """mel (n_mels, frames) -> xa (1, T, D). The window that the language was heard in is not encoded again."""
        heard, self._encoded = self._encoded, None
        if heard and np.array_equal(heard[0], mel):
            return heard[1]
        if self.windows.n_frames is not None and self.windows.n_frames <= N_FRAMES:
            return self.model.encode(mel[None])
        kernels.release_memory()  # of the last window's decoder, and then of this one's encoder: not both at once
        xa = self.model.encode(mel[None])
        kernels.release_memory()
        return xa

    def _window(self) -> list[Segment]:
        """Decode the window at `seek`, and move `seek` and the previous text on."""
        mel, n_frames = self.windows.window(self.seek)
        seek, heard = self.seek, context_frames(self.model, n_frames)
        own = Own(self.language, sound_s(n_frames, heard), (seek,))
        prompt = prompt_tokens(self.model, self.options, self._previous)
        [found] = decode_until_good(self.model, self._listen(mel[:, :heard]), self.options, prompt, [own])
        if is_silence(found, self.options):
            self.seek += n_frames
            return []
        if self.options.without_timestamps:
            pieces, advance = [(0.0, n_frames * HOP_LENGTH / SAMPLE_RATE, found.tokens)], n_frames
        else:
            begin = self.model.tokenizer.timestamp_begin
            pieces, advance = cut(found.tokens, begin, n_frames, FRAMES_PER_POSITION)
        self.seek += advance
        segments = segments_of(self.model.tokenizer, found, pieces, seek, len(self.segments))
        if self._conditioned and found.temperature <= RELIABLE_TEMPERATURE:
            self._previous += [token for segment in segments for token in segment.tokens]
        else:
            self._previous = []
        return segments


def text_tokens(model, text: str | None) -> list[int]:
    """A prompt's text -> its tokens, as they would stand within a transcript."""
    text = (text or "").strip()
    return model.tokenizer.encode(f" {text}") if text else []


def prompt_tokens(model, options: TranscribeOptions, previous: list[int]) -> list[int]:
    """Hotwords, then as much of the end of the previous text as there is space for."""
    space = model.dims.n_text_ctx // 2 - 1
    hotwords = text_tokens(model, options.hotwords)[:space]
    kept = min(space - len(hotwords), len(previous))
    return hotwords + previous[len(previous) - kept :]


def sound_s(n_frames: int, heard: int) -> float | None:
    """Of a window with so many frames of content, of which the encoder hears so many: seconds of sound where no silence
    is heard after it, else None."""
    return None if heard == N_FRAMES else n_frames * HOP_LENGTH / SAMPLE_RATE


def decode_until_good(model, xa: np.ndarray, options: TranscribeOptions, prompt: list[int], own: Sequence[Own]
                      ) -> list[DecodingResult]:  # fmt: skip
    """xa (B, T, D) -> for each window the first result, at ascending temperatures, that has not failed, else the
    last. own: seeds are to become different for each temperature."""
    found: list[DecodingResult | None] = [None] * len(own)
    left = list(range(len(own)))
    for attempt, temperature in enumerate(options.temperature):
        windows = [replace(own[i], seed=(*own[i].seed, attempt, 0)) for i in left]
        results = decode(model, xa[left], options.window(temperature, prompt), windows)
        for i, result in zip(left, results, strict=True):
            found[i] = result
        left = [i for i in left if has_failed(found[i], options)]
        if not left:
            break
    return found


def segments_of(tokenizer, found: DecodingResult, pieces: Sequence[tuple[float, float, list[int]]], seek: int,
                first: int) -> list[Segment]:  # fmt: skip
    """A window's pieces (start_s, end_s from its beginning, tokens) -> segments, the first with the number `first`.

    A segment without length or words keeps its place, empty.
    """
    segments = []
    for number, (start_s, end_s, tokens) in enumerate(pieces, first):
        offset_s = seek * HOP_LENGTH / SAMPLE_RATE
        start, end = offset_s + start_s, offset_s + end_s
        text = tokenizer.decode([token for token in tokens if token < tokenizer.eot])
        if start == end or not text.strip():
            text, tokens = "", []
        segments.append(Segment(
            id=number, seek=seek, start=start, end=end, text=text, tokens=tokens, temperature=found.temperature,
            avg_logprob=found.avg_logprob, compression_ratio=found.compression_ratio,
            no_speech_prob=found.no_speech_prob,
        ))  # fmt: skip
    return segments


def has_failed(found: DecodingResult, options: TranscribeOptions) -> bool:
    """Whether a higher temperature is worth trying: the text is repetitive or unlikely, and the window not silent."""
    repetitive = _above(found.compression_ratio, options.compression_ratio_threshold)
    unlikely = options.logprob_threshold is not None and found.avg_logprob < options.logprob_threshold
    silent = _above(found.no_speech_prob, options.no_speech_threshold) and unlikely
    return (repetitive or unlikely) and not silent


def is_silence(found: DecodingResult, options: TranscribeOptions) -> bool:
    """Whether to pass a window over: probably nobody spoke, and the text is not so likely that somebody did."""
    return _above(found.no_speech_prob, options.no_speech_threshold) and not _above(
        found.avg_logprob, options.logprob_threshold
    )


def _above(value: float, threshold: float | None) -> bool:
    return threshold is not None and value > threshold


def cut(
    tokens: list[int], timestamp_begin: int, n_frames: int, frames_per_step: int
) -> tuple[list[tuple[float, float, list[int]]], int]:
    """A window's tokens -> its segments (start_s, end_s, tokens) from the window's beginning, and the mel frames by
    which to go on.

    Two timestamps in a row end one segment and start the next. What follows the last such pair is unfinished and left
    to the next window, which begins at the pair, unless a single timestamp ends it: then nobody speaks after that, and
    the next window begins after this one. Without any pair the whole window is one segment, up to its last timestamp.
    """
    step_s = frames_per_step * HOP_LENGTH / SAMPLE_RATE  # 0.02
    is_time = [token >= timestamp_begin for token in tokens]
    ends_single = is_time[-2:] == [False, True]
    pairs = [i for i in range(1, len(tokens)) if is_time[i - 1] and is_time[i]]
    if not pairs:
        times = [token - timestamp_begin for token in tokens if token >= timestamp_begin]
        end_s = times[-1] * step_s if times and times[-1] else n_frames * HOP_LENGTH / SAMPLE_RATE
        return [(0.0, end_s, tokens)], n_frames
    bounds = [0, *pairs, *[len(tokens)] * ends_single]
    pieces = []
    for first, last in zip(bounds, bounds[1:], strict=False):
        piece = tokens[first:last]
        start, end = piece[0] - timestamp_begin, piece[-1] - timestamp_begin
        pieces.append((start * step_s, end * step_s, piece))
    return pieces, n_frames if ends_single else end * frames_per_step


if __name__ == "__main__":
    from minigate.cli import main

    raise SystemExit(main())
