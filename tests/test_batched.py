"""Windows of one or several recordings together: where they are cut, and that each has what it has by itself."""

import io
from types import SimpleNamespace

import numpy as np
import pytest

from minigate import batched, cli, mel
from minigate import transcribe as module
from minigate.batched import BatchedTranscription, cut_whole, quietest
from minigate.decoding import Own, decode
from minigate.errors import FileError
from minigate.options import DecodingOptions, TranscribeOptions
from minigate.transcribe import transcribe
from tests.scripted import ENGLISH as T
from tests.scripted import LOW, ScriptedModel, after_opening, heard, says
from tests.test_transcribe import SURE, at, times_and_texts

ASK, NOT, AND, SO = T.encode(" ask not and so")
BEGIN = T.timestamp_begin


class Windows:
    """MelWindows of a recording of n_frames whose first frame says number + seek; quiet at the frames of `pauses`, loud
    at a window's beginning for 0.3 s, and from the frames of `speech` on for 1.3 s."""

    def __init__(self, n_frames, number=0, pauses=(), error_at=None, speech=()):
        self.n_frames, self.number, self.pauses, self.error_at = n_frames, number, pauses, error_at
        self.speech = speech
        self.duration_s = n_frames / 100

    def ended(self, seek, keep=None):
        return seek >= self.n_frames

    def window(self, seek):
        if self.error_at is not None and seek >= self.error_at:
            raise FileError(f"recording {self.number}: damaged")
        n = min(3000, self.n_frames - seek)
        mel = np.zeros((80, 3000), np.float32)
        mel[:, :n] = 1
        for pause in self.pauses:
            if seek <= pause < seek + n:
                mel[:, pause - seek - 10 : pause - seek + 10] = -1
        for frame, end in ((seek, seek + 30), *((frame, frame + 130) for frame in self.speech)):
            if seek <= frame < seek + n:
                mel[1:, frame - seek : min(n, end - seek)] = 10
        mel[0, 0] = self.number + seek
        return mel, n

    def language_window(self):
        return self.window(0)[0]


@pytest.fixture(autouse=True)
def windows(monkeypatch):
    """`audio` is a Windows, or an error."""

    def fake(audio, n_mels):
        if isinstance(audio, FileError):
            raise audio
        return audio

    monkeypatch.setattr(module, "MelWindows", fake)


# --- where windows are cut


def test_a_window_is_cut_at_the_quietest_point_of_its_last_5_s():
    mel = np.random.default_rng(0).uniform(0.5, 1, (80, 3000)).astype(np.float32)
    mel[:, 1000:1040] = -1  # too early
    mel[:, 2700:2720] = 0
    mel[:, 2900:2905] = -0.2  # as quiet, but short
    assert quietest(mel) == 2710
    mel[:, 2985:] = -1  # near the end: the last moment is as quiet as any
    assert quietest(mel) == 2990
    mel[:, 2480:2520] = -2
    assert 2500 <= quietest(mel) <= 2510
    assert quietest(np.ones((80, 3000), np.float32)) == 2990


def test_pieces_cover_a_recording_and_nothing_is_heard_behind_a_cut():
    made = BatchedTranscription(ScriptedModel(says({})), Windows(8000, pauses=(2800, 5500)), TranscribeOptions())
    pieces = list(made.pieces())
    assert [(p.seek, p.n_frames) for p in pieces] == [(0, 2800), (2800, 2700), (5500, 2500)]
    for piece in pieces:
        assert piece.mel.shape == (80, 3000) and not piece.mel[:, piece.n_frames :].any()
    [whole] = BatchedTranscription(ScriptedModel(says({})), Windows(3000, pauses=(2800,)), TranscribeOptions()).pieces()
    assert whole.n_frames == 3000  # nothing follows: it is not cut


@pytest.mark.parametrize(
    ("tokens", "parts", "advance"),
    [
        ([at(0), ASK, at(2), at(2), NOT, at(3)], [(0.0, 2.0, 3), (2.0, 3.0, 3)], 2500),  # a single timestamp ends it
        ([at(0), ASK, at(2), at(3), NOT], [(0.0, 2.0, 3), (3.0, 25.0, 2)], 2500),  # the rest is not lost
        ([at(0), ASK, at(2), at(2)], [(0.0, 2.0, 3)], 200),  # it ends early
        ([at(0), ASK], [(0.0, 25.0, 2)], 2500),
        ([], [(0.0, 25.0, 0)], 2500),
    ],
)
def test_all_of_a_piece_is_cut_into_segments(tokens, parts, advance):
    found, spoken_for = cut_whole(tokens, BEGIN, 2500, 2)
    assert spoken_for == advance
    assert [(pytest.approx(start), pytest.approx(end), len(part)) for start, end, part in found] == parts
    words = [token for token in tokens if token < BEGIN]
    assert [token for _, _, part in found for token in part if token < BEGIN] == words


# --- decoding together


def test_each_window_decodes_as_by_itself_whatever_stands_beside_it():
    noise = np.random.default_rng(1).normal(size=(9, T.n_vocab)).astype(np.float32)

    def script(window, attempt, tokens):
        return 3 * noise[(len(tokens) + window) % 9] + np.where(np.arange(T.n_vocab) == T.eot, 8.0, 0)

    bounds = ((2.0, 0.0), (None, 30.0), (5.0, 4.0), (0.5, 0.0))
    own = [Own("en", sound_s, (7, i), whole_s) for i, (sound_s, whole_s) in enumerate(bounds)]
    for options in (DecodingOptions(), DecodingOptions(temperature=0.7, best_of=3), DecodingOptions(beam_size=2)):
        together = decode(ScriptedModel(script), heard(1, 2, 3, 4), options, own)
        for window, mine, result in zip((1, 2, 3, 4), own, together, strict=True):
            [alone] = decode(ScriptedModel(script), heard(window), options, [mine])
            assert alone == result
        starts = [t for r, o in zip(together, own, strict=True) if o.sound_s for t in r.tokens[:1]]
        assert all(t >= BEGIN for t in starts)


def run(texts, audio, **options):
    model = ScriptedModel(says(texts, T, SURE))
    return transcribe(model, audio, **{"language": "en", **options}), model


def test_a_long_recording_in_one_batch():
    texts = {0: [at(0), ASK, at(20)], 2800: [at(0), NOT, at(1), at(1), AND], 5500: [at(0), SO, at(2)]}
    result, model = run(texts, Windows(8000, pauses=(2800, 5500)), batch_size=3)
    assert times_and_texts(result) == [
        (0, 0.0, 20.0, " ask"), (2800, 28.0, 29.0, " not"), (2800, 29.0, 55.0, " and"), (5500, 55.0, 57.0, " so"),
    ]  # fmt: skip
    assert [s.id for s in result.segments] == [0, 1, 2, 3] and result.text == " ask not and so"
    assert model.starts == [0] and model.calls[0][0] == 3
    again, model = run(texts, Windows(8000, pauses=(2800, 5500)), batch_size=2)
    assert again == result and model.starts == [0, 5500]


def test_what_a_text_that_stops_early_leaves_is_listened_to_again():
    early = [at(0), *5 * [ASK], at(10), at(10)]  # as long as a text can be; frame 1000 of a piece says 1
    texts = {0: early, 1: [at(0), *5 * [NOT], at(2), at(2)], 2800: [at(0), SO, at(2)]}

    def found(windows):
        model = ScriptedModel(says(texts, T, SURE), n_text_ctx=16)
        return transcribe(model, windows, language="en", batch_size=2), model

    result, model = found(Windows(5000, pauses=(2800,), speech=(2600,)))
    nots = [(seek, seek / 100, seek / 100 + 2, 5 * " not") for seek in range(1000, 2800, 200)]
    assert times_and_texts(result) == [(0, 0.0, 10.0, 5 * " ask"), *nots, (2800, 28.0, 30.0, " so")]
    assert [s.id for s in result.segments] == list(range(11)) and model.starts == [0] + 9 * [1]
    for windows in (Windows(1099, speech=(1000,)), Windows(2000), Windows(2000, speech=(900,))):
        assert times_and_texts(found(windows)[0]) == [(0, 0.0, 10.0, 5 * " ask")]


def test_a_text_does_not_stop_where_a_segment_begins():
    stops = [at(0), ASK, at(10), at(10)]

    def script(window, attempt, tokens):
        said = after_opening(T, tokens)
        if len(said) == 4:
            return {T.eot: SURE, NOT: SURE / 2}
        return {(stops + [None, at(12)])[len(said)] if len(said) < 6 else T.eot: SURE}

    for speech, said in (((1100,), [" ask", " not"]), ((950,), [" ask"]), ((), [" ask"])):
        windows = Windows(2800, speech=speech)
        found = transcribe(ScriptedModel(script), windows, batch_size=2, language="en")
        assert [s.text for s in found.segments] == said
        assert (found.segments[-1].end == 12) == (len(said) == 2)


@pytest.mark.parametrize(
    ("end_s", "speech", "heard_again"),
    [
        (10, 1500, True),
        (10, 1150, False),  # too little is left
        (11.4, 1300, True),
        (13.4, 1300, False),  # over a second of it was heard
        (10, 2850, False),  # in the next window
        (24, 2600, True),
        (10, None, False),
    ],
)
def test_speech_behind_a_text_that_closes_early_is_listened_to(end_s, speech, heard_again):
    texts = {0: [at(0), ASK, at(5), at(5), NOT, at(end_s)], 1: [at(0), SO, at(1), at(1)], 2800: [at(0), AND, at(1)]}
    windows = Windows(5000, pauses=(2800,), speech=() if speech is None else (speech,))
    result, model = run(texts, windows, batch_size=2)
    texts = [s.text for s in result.segments]
    assert texts[:2] == [" ask", " not"] and texts[-1] == " and" and (" so" in texts) == heard_again
    assert [s.start for s in result.segments if s.text == " so"][:1] == [end_s] * heard_again


def test_what_is_listened_to_again_is_not_once_more():
    early = [at(0), ASK, at(2)]
    result, model = run({0: early, 1: early}, Windows(2800, speech=(1000, 2000)), batch_size=2)
    assert [(s.start, s.text) for s in result.segments] == [(0, " ask"), (2, " ask")] and model.starts == [0, 1]


@pytest.mark.parametrize("text", [[at(0)], [], [at(2)], [at(0), ASK, at(0.5)], [at(0), at(2)]])
def test_what_says_next_to_nothing_leaves_no_rest(text):
    assert run({0: text}, Windows(2800, speech=(2000,)), batch_size=2, temperature=0.0)[1].starts == [0]


@pytest.mark.parametrize("value", [0, np.nan])
@pytest.mark.parametrize("n_frames", [1, 19, 20, 21, 500])
def test_nobody_speaks_in_what_is_short_silent_or_no_number(n_frames, value):
    piece = batched.Piece(None, 0, np.full((80, 3000), value, np.float32), n_frames)
    assert not piece.speech.any() and piece.speech_end == piece.whole_s == 0


def test_steady_noise_is_no_speech():
    mel = np.random.default_rng(0).normal(0.1, 0.3, (80, 3000)).astype(np.float32)
    mel[:, 500:1000] -= 0.6
    piece = batched.Piece(None, 0, mel, 3000)
    assert piece.speech[300:370].sum() == 0 < piece.speech[400:1000].sum() and 1080 < piece.speech_end < 1140
    assert piece.whole_s == (piece.speech_end - 100) / 100
    assert batched.Piece(None, 0, mel[:, 1100:], 1900).speech_end == 0


def test_a_window_of_one_loudness_is_done_where_its_text_closes():
    windows = Windows(2000)
    windows.window = lambda seek: (np.full((80, 3000), 10.0, np.float32) * (seek > 0), 2000)
    assert len(run({0: [at(0), ASK, at(5)]}, windows, batch_size=2)[0].segments) == 1


def test_no_text_is_a_prompt_but_the_first_ones_and_hotwords():
    texts = {0: [at(0), ASK, at(20)], 2800: [at(0), NOT, at(1)]}
    _, model = run(texts, Windows(5000, pauses=(2800,)), batch_size=2, initial_prompt="so", hotwords="and")
    assert model.openings == [[T.sot_prev, AND, SO, T.sot]]


def test_only_windows_that_failed_are_tried_again():
    texts = {0: [at(0), ASK, at(20)], 2800: [at(0), NOT, at(1)], 5500: [at(0), SO, at(2)]}
    plain = says(texts, T, SURE)

    def script(window, attempt, tokens):
        unsure = window == 2800 and len(model.starts) == 1
        return {token: LOW if unsure else likely for token, likely in plain(window, attempt, tokens).items()}

    model = ScriptedModel(script)
    result = transcribe(model, Windows(8000, pauses=(2800, 5500)), batch_size=3, language="en", temperature=(0.0, 0.4))
    assert model.starts == [0, 2800]
    assert [s.temperature for s in result.segments] == [0.0, 0.4, 0.0]


def test_progress_tells_what_is_found_not_what_is_read():
    texts, seen = {0: [at(0), ASK, at(20)], 2800: [at(0), NOT, at(1)]}, []
    run(texts, Windows(5000, pauses=(2800,)), batch_size=4, on_progress=lambda *s: seen.append(s))
    assert seen == [(28.0, 50.0), (50.0, 50.0)]


def test_variable_context_takes_pieces_of_one_length_together():
    model = ScriptedModel(says({n: [at(0), ASK, at(0.5)] for n in (0, 10, 20, 30, 40)}, T, SURE))
    model.metadata = {**model.metadata, "audio_context": "variable"}
    shapes = []
    model.encode = lambda mel: shapes.append((len(mel), mel.shape[2])) or np.repeat(mel[:, :1, :1], 2, axis=2)
    sources = [Windows(frames, 10 * i) for i, frames in enumerate((150, 480, 130, 500, 410))]
    found = list(batched.transcribe_all(model, sources, TranscribeOptions(batch_size=2)))
    assert sorted(shapes) == [(1, 500), (2, 200), (2, 500)]
    assert [f.number for f in found] == [n for n in range(5) for _ in range(3)]  # opened, a window, the end
    assert [f.segments[0].text for f in found[1::3]] == [" ask"] * 5


def test_standard_input_is_read_once_and_cut_all_the_same(monkeypatch):
    noise = np.random.default_rng(0).normal(0, 0.1, 16000 * 70)
    noise[16000 * 27 : 16000 * 28] = noise[16000 * 56 : 16000 * 57] = 0  # pauses
    pcm = (noise * 32767).astype("<i2").tobytes()
    monkeypatch.setattr(module, "MelWindows", mel.MelWindows)
    model = ScriptedModel(lambda *_: {T.eot: SURE})
    cuts = []
    for audio in ("-", (np.frombuffer(pcm, "<i2") / np.float32(32768)).astype(np.float32)):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(pcm)))
        made = BatchedTranscription(model, audio, TranscribeOptions(batch_size=4))
        cuts.append([(p.seek, p.n_frames) for p in made.pieces()])
    assert cuts[0] == cuts[1] and len(cuts[0]) == 3
    assert 2700 <= cuts[0][0][1] <= 2800 and sum(n for _, n in cuts[0]) == 7000


def test_what_was_read_before_the_damage_is_found():
    texts, found = {0: [at(0), ASK, at(20)]}, []
    model = ScriptedModel(says(texts, T, SURE))
    made = BatchedTranscription(model, Windows(8000, pauses=(2800,), error_at=2800), TranscribeOptions(batch_size=4))
    with pytest.raises(FileError, match="damaged"):
        for segments in made.by_window():
            found += segments
    assert [s.text for s in found] == [" ask"]


# --- several recordings


def test_recordings_share_batches_and_one_that_fails_takes_no_other_with_it():
    texts = {n: [at(0), token, at(2)] for n, token in ((0, ASK), (10000, NOT), (30000, SO))}
    model = ScriptedModel(says(texts, T, SURE))
    damaged = Windows(5000, 10000, error_at=2500)
    sources = [Windows(1000), damaged, FileError("no file"), Windows(900, 30000), Windows(0)]
    together = batched.Together(model, sources, TranscribeOptions(batch_size=3))
    first, segments = together.next("a")
    assert [s.text for window in segments for s in window] == [" ask"] and first.result().text == " ask"
    second, segments = together.next("b")
    assert [s.text for s in next(segments)] == [" not"]
    with pytest.raises(FileError, match="recording 10000: damaged"):
        next(segments)
    with pytest.raises(FileError, match="no file"):
        together.next("c")
    fourth, segments = together.next("d")
    assert [s.text for window in segments for s in window] == [" so"] and fourth.done_s == 9.0
    _, segments = together.next("e")
    assert list(segments) == []
    assert model.starts == [0]  # the windows of three recordings


def test_a_batch_that_fails_is_said_for_each_recording_lost():
    def script(window, attempt, tokens):
        raise MemoryError

    together = batched.Together(ScriptedModel(script), [Windows(900), Windows(800)], TranscribeOptions(batch_size=2))
    with pytest.raises(MemoryError):
        list(together.next("a")[1])
    with pytest.raises(FileError, match="b: not transcribed, .* smaller --batch-size may help"):
        together.next("b")


def test_files_on_the_command_line(monkeypatch, tmp_path, capsys):
    texts = {n: [at(0), token, at(2)] for n, token in ((0, ASK), (20000, SO))}
    monkeypatch.setattr(cli, "load", lambda name, threads: ScriptedModel(says(texts, T, SURE)))
    audio = {"a": Windows(500), "b": FileError("b: not there"), "c": Windows(600, 20000)}
    monkeypatch.setattr(module, "MelWindows", lambda path, n_mels: fake(audio[path]))

    def fake(found):
        if isinstance(found, FileError):
            raise found
        return found

    code = cli.main(["a", "b", "c", "--batch-size", "8", "--output-dir", str(tmp_path)])
    assert code == 1 and {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.txt": "ask\n", "c.txt": "so\n"}
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["a", "--batch-size", "0"]) == 2
    assert "--batch-size: expected a whole number from 1 to 64, got 0" in capsys.readouterr().err
