"""A model that says what a test wants: logits by the test's own function, of the tokens so far."""

from types import SimpleNamespace

import numpy as np

from minigate.tokenizer import Tokenizer

BYTES = [bytes([i]) for i in range(256)]
WORDS = [b" and", b" so", b" my", b" fellow", b" Americans", b" ask", b" not"]
WORDS += [b" -", b" '", b" \xe2"]  # with which non-speech symbols begin, so that a blank alone is not one of them
ENGLISH = Tokenizer(BYTES + WORDS, 256 + len(WORDS) + 1608)
LOW = -20.0  # logit of every token that a script does not mention


def multilingual() -> Tokenizer:
    """Whisper's size with 99 languages; beyond the bytes the words are made up."""
    return Tokenizer(BYTES + WORDS + [b"%05d" % i for i in range(256 + len(WORDS), 50257)], 51865)


class Cache:
    """The tokens of each row, and the window that each listens to."""

    def __init__(self, windows: np.ndarray, attempt: int):
        self.windows, self.group, self.attempt = windows, 1, attempt
        self.histories = [[] for _ in self.windows]

    def repeat(self, group):
        self.windows, self.group = np.repeat(self.windows, group), group
        self.histories = [list(history) for history in self.histories for _ in range(group)]

    def reorder(self, rows):
        assert len(rows) == len(self.histories)
        self.histories = [list(self.histories[row]) for row in rows]

    def keep(self, windows):
        rows = [window * self.group + i for window in windows for i in range(self.group)]
        self.windows = self.windows[rows]
        self.histories = [self.histories[row] for row in rows]


class ScriptedModel:
    """`script(window, attempt, tokens)` -> {token: logit} or logits (V,), for the tokens of a row, opening included.

    window: what mel[0, 0] holds; attempt: how often this window was started before.
    """

    def __init__(self, script, tokenizer: Tokenizer = ENGLISH, n_text_ctx: int = 448):
        self.script, self.tokenizer = script, tokenizer
        self.metadata = {"suppress_tokens": None}
        self.is_multilingual = tokenizer.is_multilingual
        self.knows_prompts = True
        self.dims = SimpleNamespace(
            n_mels=80, n_audio_ctx=1500, n_audio_state=2, n_vocab=tokenizer.n_vocab, n_text_ctx=n_text_ctx
        )
        self.starts: list[int] = []  # the windows of every start
        self.calls: list[tuple[int, int]] = []  # tokens.shape of every decode
        self.openings: list[list[int]] = []  # for every start, the first row's tokens up to sot

    def encode(self, mel):
        assert mel.shape[1:] == (80, 3000) and mel.dtype == np.float32
        return np.repeat(mel[:, :1, :1], 2, axis=2)

    def start(self, xa):
        windows = xa[:, 0, 0].astype(int)
        attempt = self.starts.count(windows[0])
        self.starts.append(windows[0])
        return Cache(windows, attempt)

    def decode(self, tokens, cache):
        assert tokens.shape[0] == len(cache.histories) and tokens.shape[1] > 0
        self.calls.append(tokens.shape)
        rows = []
        for window, history, new in zip(cache.windows, cache.histories, tokens, strict=True):
            history.extend(new.tolist())
            if history[-1] == self.tokenizer.sot and cache.histories[0] is history:
                self.openings.append(history[:])
            assert len(history) <= self.dims.n_text_ctx
            row = self.script(int(window), cache.attempt, history)
            if isinstance(row, dict):
                row = logits(self.tokenizer, row)
            rows.append(row)
        return np.stack(rows).astype(np.float32)


def logits(tokenizer: Tokenizer, mentioned: dict[int, float]) -> np.ndarray:
    """{token: logit} -> (V,), everything else LOW."""
    row = np.full(tokenizer.n_vocab, LOW, np.float32)
    row[list(mentioned)] = list(mentioned.values())
    return row


def heard(*windows: int) -> np.ndarray:
    """What `encode` returns for these windows."""
    return np.repeat(np.array(windows, np.float32)[:, None, None], 2, axis=2)


def after_opening(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """The tokens decoded so far: those behind sot, language, task and no_timestamps."""
    rest = tokens[tokens.index(tokenizer.sot) + 1 :] if tokenizer.sot in tokens else []
    opening = {*tokenizer.all_language_tokens, tokenizer.transcribe, tokenizer.translate, tokenizer.no_timestamps}
    return [token for token in rest if token not in opening]


def says(texts: dict, tokenizer: Tokenizer = ENGLISH, likely: float = 10.0):
    """A script that says texts[window], or texts[window][attempt] for a list of lists, token by token, then ends.

    The token's logit is `likely`, so that its log-probability is about 0 (or -log V for LOW).
    """

    def script(window, attempt, tokens):
        text = texts[window]
        if text and isinstance(text[0], list):
            text = text[min(attempt, len(text) - 1)]
        n = len(after_opening(tokenizer, tokens))
        return {text[n] if n < len(text) else tokenizer.eot: likely}

    return script
