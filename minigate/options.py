"""Every option of transcription: name, default, unit and range, the same in Python and on the command line.

`TranscribeOptions` is what a user chooses for a recording, `DecodingOptions` what follows from it for one window at
one temperature. `add_decoding_arguments` and `decoding_options` carry the former through argparse. A value outside
its range is a UsageError of one line: "beam_size: expected a whole number from 1 to 100, got 0".
"""

import argparse
import math
import operator
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, fields
from numbers import Integral, Real

from minigate.errors import UsageError
from minigate.languages import language_code
from minigate.tokenizer import TASKS

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
LEAST_TEMPERATURE = 0.01  # above 0: logits / temperature stay in float32's range
MAX_WINDOWS = 64  # decoded together: keys and values of the sound alone are 18 MB each for tiny, 37 for base
MAX_TEXTS = 100  # beams or samples decoded at once: memory and time grow with each
MODEL_SUPPRESS_SET = -1  # in suppress_tokens: the model's own list of non-speech symbols


@dataclass(frozen=True)
class TranscribeOptions:
    """How a recording is transcribed. Raises UsageError for a value outside its range."""

    language: str | None = None  # code or name; None, "auto": detected in the first 30 s (English-only models: en)
    task: str = "transcribe"  # or "translate": to English
    beam_size: int = 1  # beams at temperature 0; 1 is greedy
    patience: float = 1.0  # beam search ends with round(beam_size * patience) finished texts
    length_penalty: float | None = None  # 0 to 1, alpha of Google NMT; None: mean log-probability per token
    best_of: int = 5  # samples at a temperature above 0
    temperature: float | tuple[float, ...] = TEMPERATURES  # tried in turn until a window's text passes the thresholds
    compression_ratio_threshold: float | None = 2.4  # a text that zlib shrinks more than so failed; None: no check
    logprob_threshold: float | None = -1.0  # a mean log-probability per token below failed; None: no check
    no_speech_threshold: float | None = 0.6  # probability above which a window that is also unlikely is silence
    condition_on_previous_text: bool | None = None  # the text so far is the next window's prompt; None: where the
    # model was trained with prompts, as OpenAI's were and students are not
    initial_prompt: str | None = None  # text before the first window
    hotwords: str | None = None  # words before every window, in front of the previous text
    suppress_tokens: str | Iterable[int] | None = "-1"  # never decoded; -1: the model's list of non-speech symbols
    without_timestamps: bool = False  # one segment per 30 s window
    batch_size: int = 1  # windows decoded together; above 1 they are cut beforehand and no text is a prompt for another

    def __post_init__(self):
        check = Checks(self)
        check.language()
        check.choice("task", TASKS)
        check.whole("beam_size", 1, MAX_TEXTS)
        check.number("patience", 0, above=True)
        check.number("length_penalty", 0, 1, optional=True)
        check.whole("best_of", 1, MAX_TEXTS)
        check.temperatures()
        check.number("compression_ratio_threshold", 0, optional=True)
        check.number("logprob_threshold", high=0, optional=True)
        check.number("no_speech_threshold", 0, 1, optional=True)
        check.flag("condition_on_previous_text", optional=True)
        check.text("initial_prompt")
        check.text("hotwords")
        check.tokens()
        check.flag("without_timestamps")
        check.finished_texts()
        check.whole("batch_size", 1, MAX_WINDOWS)

    def window(self, temperature: float, prompt: list[int]) -> "DecodingOptions":
        """The options of decoding windows, but for what each has for itself (`decoding.Own`)."""
        return DecodingOptions(
            task=self.task, temperature=temperature, beam_size=self.beam_size, patience=self.patience,
            best_of=self.best_of, length_penalty=self.length_penalty, prompt=tuple(prompt),
            suppress_tokens=self.suppress_tokens, without_timestamps=self.without_timestamps,
        )  # fmt: skip


@dataclass(frozen=True)
class DecodingOptions:
    """How one window is decoded. Raises UsageError for a value outside its range."""

    language: str | None = None  # None: detected for each window
    task: str = "transcribe"
    temperature: float = 0.0  # 0: greedy or beam search; above: best of `best_of` samples
    beam_size: int = 1  # at temperature 0 only
    patience: float = 1.0  # at temperature 0 only
    best_of: int = 1  # above temperature 0 only
    length_penalty: float | None = None
    prompt: tuple[int, ...] = ()  # tokens of the text before; the last n_text_ctx // 2 - 1 are used
    suppress_tokens: str | Iterable[int] | None = "-1"
    suppress_blank: bool = True  # no space and no end as the first token
    without_timestamps: bool = False
    max_initial_timestamp: float | None = 1.0  # s, latest start of the first segment; None: anywhere
    sound_s: float | None = None  # s of sound, for a model that hears no silence after it; None: there is silence
    sample_len: int | None = None  # most tokens decoded; None: n_text_ctx // 2
    seed: int | tuple[int, ...] = 0  # of the draws at temperatures above 0

    def __post_init__(self):
        check = Checks(self)
        check.language()
        check.choice("task", TASKS)
        check.temperature()
        check.whole("beam_size", 1, MAX_TEXTS)
        check.number("patience", 0, above=True)
        check.whole("best_of", 1, MAX_TEXTS)
        check.number("length_penalty", 0, 1, optional=True)
        check.tokens()
        check.number("max_initial_timestamp", 0, 30, optional=True)
        check.number("sound_s", 0, 30, optional=True)
        check.whole("sample_len", 1, optional=True)
        check.finished_texts()


class Checks:
    """Checks of the fields of a frozen options object; what is given in several forms is put into one."""

    def __init__(self, options):
        self.options = options

    def refuse(self, name: str, expected: str, got):
        raise UsageError(f"{name}: expected {expected}, got {' '.join(repr(got).split())[:80]}")

    def set(self, name: str, value):
        object.__setattr__(self.options, name, value)

    def whole(self, name: str, low: int, high: int | None = None, optional: bool = False):
        value = getattr(self.options, name)
        if optional and value is None:
            return
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_whole or value < low or (high is not None and value > high):
            bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
            self.refuse(name, f"a whole number {bounds}", value)

    def number(self, name: str, low=-math.inf, high=math.inf, above: bool = False, optional: bool = False):
        """A finite number from low to high; `above`: greater than low."""
        value = getattr(self.options, name)
        if optional and value is None:
            return
        if not _is_number(value) or not low <= value <= high or (above and value == low):
            bounds = [f"above {low}" if above else f"of at least {low}"] * (low > -math.inf)
            bounds += [f"of at most {high}"] * (high < math.inf)
            self.refuse(name, " ".join(["a number", " and ".join(bounds)]) + " or none" * optional, value)

    def choice(self, name: str, choices: tuple[str, ...]):
        if getattr(self.options, name) not in choices:
            self.refuse(name, " or ".join(choices), getattr(self.options, name))

    def flag(self, name: str, optional: bool = False):
        value = getattr(self.options, name)
        if not (isinstance(value, bool) or optional and value is None):
            self.refuse(name, "True, False or None" if optional else "True or False", value)

    def text(self, name: str):
        value = getattr(self.options, name)
        if not isinstance(value, str | None):
            self.refuse(name, "a text or none", value)
        if value is not None and not _is_unicode(value):
            self.refuse(name, "a text that UTF-8 can hold", value)

    def language(self):
        value = self.options.language
        self.set("language", None if value in (None, "auto") else language_code(value))

    def temperature(self):
        value = self.options.temperature
        if not _is_temperature(value):
            self.refuse("temperature", f"0 or a number of at least {LEAST_TEMPERATURE}", value)

    def temperatures(self):
        value = self.options.temperature
        values = (value,) if isinstance(value, Real) else tuple(value) if isinstance(value, Iterable) else ()
        if not values or not all(map(_is_temperature, values)):
            self.refuse("temperature", f"0 or a number of at least {LEAST_TEMPERATURE}, or a sequence of them", value)
        self.set("temperature", tuple(float(t) for t in values))

    def tokens(self):
        """A string of comma-separated ids, or the ids -> a tuple of ids."""
        value = self.options.suppress_tokens
        parts = () if value is None else value
        if isinstance(value, str):
            parts = value.split(",") if value.strip() else ()
        try:
            ids = tuple(int(part) if isinstance(part, str) else operator.index(part) for part in parts)
        except (TypeError, ValueError):
            ids = None
        if ids is None or any(token < MODEL_SUPPRESS_SET for token in ids):
            self.refuse("suppress_tokens", "token ids (-1: the model's list of non-speech symbols)", value)
        self.set("suppress_tokens", ids)

    def finished_texts(self):
        texts = self.options.beam_size * self.options.patience
        if not math.isfinite(texts) or round(texts) < 1:
            self.refuse("patience", "beam_size * patience to be finite and round to 1 at least", self.options.patience)


def _is_unicode(text: str) -> bool:
    """No lone surrogates, which stand for undecodable bytes of a command line."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_temperature(value) -> bool:
    return _is_number(value) and (value == 0 or value >= LEAST_TEMPERATURE)


# --- the command line ---


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that says what is wrong in one line and exits with 2. Options cannot be abbreviated."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def add_decoding_arguments(parser: argparse.ArgumentParser, defaults: dict | None = None) -> None:
    """Add a flag for each field of TranscribeOptions. `defaults`: fields whose default differs here."""
    default = TranscribeOptions(**(defaults or {}))
    group = parser.add_argument_group("decoding")

    def add(name: str, parse, metavar: str, text: str):
        value = getattr(default, name)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else value
        group.add_argument(flag_of(name), type=parse, default=value, metavar=metavar, help=f"{text} (default: {shown})")

    group.add_argument("--language", default=default.language or "auto", metavar="CODE",
                       help="language spoken: a code (de), a name (german) or auto, which listens to the first 30 s; "
                            f"English-only models know en alone (default: {default.language or 'auto'})")
    group.add_argument("--task", choices=TASKS, default=default.task,
                       help=f"transcribe, or translate into English (default: {default.task})")
    add("beam_size", as_whole, "N", f"beams at temperature 0, 1 to {MAX_TEXTS}; 1 is greedy")
    add("patience", as_number, "X", "beam search ends with round(beam size * X) finished texts")
    add("length_penalty", as_number_or_none, "ALPHA", "Google NMT's length penalty between texts, 0 to 1; none: mean "
        "log-probability per token")
    add("best_of", as_whole, "N", f"samples at a temperature above 0, 1 to {MAX_TEXTS}")
    add("temperature", as_numbers, "T[,T…]", "temperatures that are tried in turn until a window's text passes the "
        "thresholds; a single number: no fallback")
    add("compression_ratio_threshold", as_number_or_none, "X", "a text whose UTF-8 bytes are more than X times its "
        "zlib bytes is repetitive and failed; none: no check")
    add("logprob_threshold", as_number_or_none, "X", "a text with a mean log-probability (natural) per token below X "
        "failed; none: no check")
    add("no_speech_threshold", as_number_or_none, "P", "a window whose no-speech probability is above P and whose text "
        "is below the log-probability threshold is silence; none: no check")
    group.add_argument("--condition-on-previous-text", action=argparse.BooleanOptionalAction,
                       default=default.condition_on_previous_text,
                       help="give a window the text before it as a prompt, or do not (default: give it to a model that "
                            "was trained with prompts, as OpenAI's were and students of minigate.train are not)")
    add("initial_prompt", str, "TEXT", "text that precedes the first window, with --batch-size each of them")
    add("hotwords", str, "TEXT", "words that precede every window, names for instance; behind them, as behind any "
        "prompt, a student of minigate.train leaves out much")
    add("suppress_tokens", str, "IDS", "comma-separated ids of tokens that are never decoded, '' for none, -1 for the "
        "model's list of non-speech symbols; write --suppress-tokens=-1,50 with the equals sign")
    add("batch_size", as_whole, "N", f"windows of 30 s that are decoded together, 1 to {MAX_WINDOWS}, in "
        "minigate.transcribe those of several recordings too; above 1 a long recording is cut beforehand at the "
        "quietest point of each window's last 5 s, and no window has the text before it as a prompt")
    group.add_argument("--without-timestamps", action="store_true", default=default.without_timestamps,
                       help="decode text only, one segment per 30 s window (default: "
                            f"{'without' if default.without_timestamps else 'with timestamps'})")


def decoding_options(args: argparse.Namespace) -> dict:
    """Parsed arguments -> the keyword arguments of `transcribe`, checked. UsageError names the flag."""
    names = [field.name for field in fields(TranscribeOptions) if hasattr(args, field.name)]
    options = {name: getattr(args, name) for name in names}
    with errors_name_flags():
        checked = TranscribeOptions(**options)
    return {name: getattr(checked, name) for name in options}


@contextmanager
def errors_name_flags():
    """A UsageError about an option, raised inside, names the flag: "beam_size: …" becomes "--beam-size: …"."""
    try:
        yield
    except UsageError as error:
        name, _, rest = str(error).partition(":")
        if name not in ("threads", *(field.name for field in fields(TranscribeOptions))):
            raise
        raise UsageError(f"{flag_of(name)}:{rest}") from None


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def as_number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else as_number(text)


def as_numbers(text: str) -> tuple[float, ...]:
    return tuple(as_number(part) for part in text.split(","))
