"""One window of sound -> tokens: what the encoder heard (B, T, D) -> a text for each window.

The transcript is opened with the previous text, language and task; then a search (`search.py`) extends it token by
token under the rules (`rules.py`) until it ends. Tokens, ties and probabilities are openai/whisper's.

B windows, T audio positions, D n_state, V n_vocab.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minigate.options import DecodingOptions
from minigate.rules import Rules
from minigate.search import Beam, Sampler, Text, best_text


@dataclass(frozen=True)
class DecodingResult:
    """The text of one window."""

    tokens: list[int]  # timestamps included, without the opening and the end token
    text: str  # without timestamps and surrounding blanks
    language: str  # code
    language_probs: dict[str, float] | None  # by code, where the language was detected
    avg_logprob: float  # sum of the log-probabilities / (tokens + 1)
    no_speech_prob: float  # of <|nospeech|> right after <|startoftranscript|>
    temperature: float
    compression_ratio: float  # UTF-8 bytes / zlib bytes of the text


@dataclass(frozen=True)
class Own:
    """What a window has for itself where several are decoded together; the rest is as in DecodingOptions."""

    language: str  # code
    sound_s: float | None = None
    seed: tuple[int, ...] = ()
    whole_s: float = 0.0  # a segment that begins before has words, none is left to a next window


def detect_language(model, xa: np.ndarray) -> list[dict[str, float]]:
    """xa (B, T, D) -> for each window the probability of every language that a multilingual model knows."""
    tokenizer = model.tokenizer
    logits = model.decode(np.full((len(xa), 1), tokenizer.sot), model.start(xa))
    probs = softmax(logits[:, list(tokenizer.all_language_tokens)])
    return [dict(zip(tokenizer.all_language_codes, map(float, row), strict=True)) for row in probs]


def decode(model, xa: np.ndarray, options: DecodingOptions | None = None, own: Sequence[Own] = ()
           ) -> list[DecodingResult]:  # fmt: skip
    """xa (B, T, D) as `model.encode` returns it -> B results.

    own: B of them, where windows differ in more than their sound. A window's result is the one that it has by itself,
    but for the last digits of its logits. Raises UsageError when the model cannot do what the options ask: another
    language or task, tokens it lacks.
    """
    options = options or DecodingOptions()
    if own:
        probs, languages = [None] * len(xa), [window.language for window in own]
    elif options.language is None and model.is_multilingual:
        probs = detect_language(model, xa)
        languages = [max(p, key=p.get) for p in probs]
    else:
        probs = [None] * len(xa)
        languages = [model.tokenizer.language_code(options.language)] * len(xa)
    seed = (options.seed,) if isinstance(options.seed, int) else options.seed
    own = own or [Own(language, options.sound_s, (*seed, i)) for i, language in enumerate(languages)]
    texts, no_speech = search_texts(model, xa, options, own)
    results = []
    for window, text in sorted(texts.items()):
        plain = model.tokenizer.decode(text.tokens).strip()
        results.append(DecodingResult(
            tokens=text.tokens, text=plain, language=languages[window], language_probs=probs[window],
            avg_logprob=text.sum_logprob / (len(text.tokens) + 1), no_speech_prob=float(no_speech[window]),
            temperature=options.temperature, compression_ratio=compression_ratio(plain),
        ))  # fmt: skip
    return results


def search_texts(
    model, xa: np.ndarray, options: DecodingOptions, own: Sequence[Own]
) -> tuple[dict[int, Text], np.ndarray]:
    """xa (B, T, D) -> the best text by window, and the windows' no-speech probabilities (B,)."""
    search = new_search(options, [window.seed for window in own], model.tokenizer.eot)
    opening, sot = opening_tokens(model, options, [window.language for window in own])
    cache = model.start(xa)
    logits, no_speech = open_transcript(model, opening, sot, cache)
    cache.repeat(search.group)
    logits = np.repeat(logits, search.group, axis=0)
    bounds = ([window.sound_s for window in own], [window.whole_s for window in own])
    rules = Rules(model, options, *(np.repeat(each, search.group) for each in bounds))
    texts: dict[int, Text] = {}
    windows = np.arange(len(xa))  # those still decoded
    steps = min(options.sample_len or model.dims.n_text_ctx // 2, model.dims.n_text_ctx + 1 - opening.shape[1])
    for step in range(steps):
        sources = search.step(logits, rules.choose(logits, search.tokens, search.candidates))
        done = search.done() | (step == steps - 1)
        for i in np.flatnonzero(done):
            texts[windows[i]] = best_text(search.texts(i), options.length_penalty)
        if done.all():
            break
        if sources is not None:
            cache.reorder(sources)
        if done.any():
            left = np.flatnonzero(~done)
            windows = windows[left]
            search.keep(left)
            cache.keep(left)
            rules.keep((left[:, None] * search.group + np.arange(search.group)).ravel())
        logits = model.decode(search.tokens[:, -1:], cache)
    return texts, no_speech


def new_search(options: DecodingOptions, seeds: Sequence[tuple[int, ...]], eot: int) -> Sampler | Beam:
    """The search that the options ask for, a seed for each window. One beam without patience is greedy."""
    if options.temperature > 0:
        return Sampler(seeds, options.best_of, eot, options.temperature)
    if options.beam_size > 1 or options.patience != 1:
        return Beam(len(seeds), options.beam_size, eot, options.patience)
    return Sampler(seeds, 1, eot, 0.0)


def opening_tokens(model, options: DecodingOptions, languages: list[str]) -> tuple[np.ndarray, int]:
    """The tokens before the text (B, n): [sot_prev, previous text,] sot, language, task[, no_timestamps]; and where
    sot is. Of the prompt the last n_text_ctx / 2 - 1 tokens are used."""
    tokenizer = model.tokenizer
    prompt = list(options.prompt)[-(model.dims.n_text_ctx // 2 - 1) :]
    previous = [tokenizer.sot_prev, *prompt] if prompt else []
    timestamps = not options.without_timestamps
    rows = [[*previous, *tokenizer.sot_sequence(language, options.task, timestamps)] for language in languages]
    return np.array(rows), len(previous)


def open_transcript(model, opening: np.ndarray, sot: int, cache) -> tuple[np.ndarray, np.ndarray]:
    """opening (B, n), sot at position `sot` -> logits (B, V) after it all, no-speech probability (B,).

    The latter is read at sot, so the model is called up to there and once more for the rest.
    """
    logits = model.decode(opening[:, : sot + 1], cache)
    no_speech = softmax(logits)[:, model.tokenizer.no_speech]
    if opening.shape[1] > sot + 1:
        logits = model.decode(opening[:, sot + 1 :], cache)
    return logits, no_speech


def softmax(logits: np.ndarray) -> np.ndarray:
    """logits (rows, n) -> probabilities (rows, n)."""
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def compression_ratio(text: str) -> float:
    """UTF-8 bytes / zlib bytes: above 2.4 a text is repetitive."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))
