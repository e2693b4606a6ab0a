"""Order and batches: every window once an epoch, positions to go back to, shares, and the arrays of a step."""

import json

import numpy as np
import pytest
from sounds import measured
from test_data import imagined
from toy import toy_model

from minigate import batches
from minigate.augment import AugmentOptions
from minigate.batches import Batches, Order, decoder_arrays
from minigate.data import make_windows
from minigate.errors import FileError, UsageError
from minigate.labels import Label, LabelCache, Labeller, LabelOptions
from minigate.melcache import MelCache
from minigate.model import Model


@pytest.fixture(scope="module", params=["full", "variable"])
def order(request):
    def make(seed=0, batch_seconds=80, count=300):
        return Order(make_windows(imagined(count), request.param, 0), request.param, batch_seconds, seed)

    make.mode = request.param
    return make


def epoch(order: Order):
    """The draws of the rest of an epoch."""
    now, draws = order.epoch, []
    while order.epoch == now:
        draws.append(order.next())
    return draws


# --- order


def test_every_window_once_an_epoch_in_batches_within_the_bound(order):
    windows = order()
    for number in range(3):
        draws = epoch(windows)
        assert {draw.epoch for draw in draws} == {number}
        heard = [window for draw in draws for window in draw.windows]
        assert len(heard) == len(windows.windows) and set(heard) == set(windows.windows)
        for draw in draws:
            assert draw.length_s == (30 if order.mode == "full" else max(w.rounded_s for w in draw.windows))
            assert draw.length_s * len(draw.windows) <= 80
        full = [draw for draw in draws if draw.length_s * (len(draw.windows) + 1) > 80]
        assert len(full) >= 0.9 * len(draws)


def test_a_batch_of_variable_length_holds_windows_of_about_one_length():
    windows = Order(make_windows(imagined(2000), "variable", 0), "variable", 80, 0)
    heard = sum(draw.length_s * len(draw.windows) for draw in epoch(windows))
    assert heard < 1.05 * sum(w.rounded_s for w in windows.windows)


def test_a_share_is_padded_chosen_anew_for_each_epoch():
    windows = make_windows(imagined(400), "variable", 0)
    padded = Order(windows, "variable", 80, 0, padded_share=0.25)
    chosen = []
    for _ in range(2):
        draws = epoch(padded)
        heard = {w: draw.length_s for draw in draws for w in draw.windows}
        assert set(heard) == set(windows) and all(s >= w.rounded_s for w, s in heard.items())
        assert all(draw.length_s * len(draw.windows) <= 80 for draw in draws)
        short = [w for w in windows if w.rounded_s < 25]
        chosen.append({w for w in short if heard[w] == 30})
        assert 0.15 < len(chosen[-1]) / len(short) < 0.35
    assert chosen[0] != chosen[1]
    with pytest.raises(FileError, match="padded share of the checkpoint"):
        Order(windows, "variable", 80, 0).restore(padded.state())


def test_a_batch_holds_one_window_at_least(order):
    assert all(len(draw.windows) == 1 for draw in epoch(order(batch_seconds=0.5)))


def test_order_follows_from_seed_and_epoch(order):
    def plan(seed):
        windows = order(seed)
        return [[draw.windows for draw in epoch(windows)] for _ in range(2)]

    first, again, other = plan(0), plan(0), plan(1)
    assert first == again
    assert first[0] != first[1] and first[0] != other[0]
    assert {frozenset(b) for b in first[0]} != {frozenset(b) for b in first[1]}  # other company, not only other places


@pytest.mark.parametrize("steps", [0, 1, 7, 500])
def test_a_position_is_gone_back_to_exactly(order, steps):
    windows = order()
    for _ in range(steps):
        windows.next()
    state = json.loads(json.dumps(windows.state()))
    to_come = [windows.next() for _ in range(200)]
    resumed = order()
    resumed.restore(state)
    assert [resumed.next() for _ in range(200)] == to_come


def test_a_position_in_other_data_is_refused(order):
    state = order().state()
    for other in (order(seed=1), order(batch_seconds=60), order(count=299)):
        with pytest.raises(FileError, match="training data: expected the windows, .* of the checkpoint"):
            other.restore(state)


def test_upcoming_windows(order):
    windows = order()
    windows.next()
    state = windows.state()
    for count in (0, 1, 5, 10**9):
        found = windows.upcoming(count)
        assert windows.state() == state
        ahead = order()
        ahead.restore(state)
        expected = {w for _ in range(min(count, 1000)) for w in ahead.next().windows}
        assert len(found) == len(set(found)) and set(found) == expected


def test_bad_arguments():
    windows = make_windows(imagined(3), "full", 0)
    with pytest.raises(UsageError, match="audio_context: expected one of full variable, got 'single'"):
        Order(windows, "single", 80, 0)
    with pytest.raises(UsageError, match="batch_seconds: expected a number above 0, got 0"):
        Order(windows, "full", 0, 0)
    with pytest.raises(FileError, match="training data: expected a window of sound at least, got none"):
        Order([], "full", 80, 0)


# --- arrays


def label(opening, targets, width=3):
    hidden = np.arange(1, len(targets) * width + 1).reshape(-1, width)
    return Label(np.array(opening, np.int32), np.array(targets, np.int32), hidden.astype(np.float16))


def test_decoder_arrays():
    """sot 50, no_timestamps 51, eot 9."""
    tokens_in, targets, hidden = decoder_arrays([label([50, 51], [1, 2, 9]), label([50], [4, 9])])
    assert tokens_in[0].tolist() == [50, 51, 1, 2] and tokens_in[1, :2].tolist() == [50, 4]
    assert targets.tolist() == [[-1, 1, 2, 9], [4, 9, -1, -1]]
    assert hidden.dtype == np.float16
    none, rows = [0, 0, 0], [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert hidden.tolist() == [[none, *rows], [*rows[:2], none, none]]


@pytest.fixture(scope="module")
def teacher():
    return Model(*toy_model(n_audio_ctx=1500, n_vocab=1864, n_text_ctx=24, n_audio_layer=1, n_text_layer=1))


@pytest.fixture(scope="module")
def corpus(teacher, tmp_path_factory):
    """A mode -> windows of six short recordings, and a labeller that keeps its labels."""
    folder = tmp_path_factory.mktemp("corpus")
    recordings, found = measured(folder, [0.5, 1.2, 2.5, 0.3, 3.1, 0.8])
    cache, mels = LabelCache(folder / "labels", "00" * 32), MelCache(recordings, 8, folder / "mel")

    def make(mode, augment=None, encoding_for=None):
        labeller = Labeller(teacher, cache, mels, encoding_for=encoding_for)
        return make_windows(found, mode, 0, augment), labeller

    return make


@pytest.mark.parametrize("mode", ["full", "variable"])
def test_arrays_of_a_step(corpus, teacher, mode):
    windows, labeller = corpus(mode)
    loader = Batches(labeller, mode)
    draw = Order(windows, mode, 80, 0).next()
    batch = loader.load(draw)
    rows = len(draw.windows)
    assert batch.windows == draw.windows and batch.mel.dtype == np.float32
    assert batch.mel.shape == (rows, 8, 100 * draw.length_s)
    own_s = [w.rounded_s if mode == "variable" else 30 for w in draw.windows]
    assert batch.frames.tolist() == [50 * s for s in own_s]
    assert batch.seconds == pytest.approx(sum(w.samples for w in draw.windows) / 16000)
    whole = loader.mels.padded(batch.windows, 3000)
    assert batch.teacher_xa is None
    assert whole.shape == (rows, 8, 3000)
    np.testing.assert_array_equal(batch.mel, whole[:, :, : batch.mel.shape[2]])
    scored = batch.targets >= 0
    assert (batch.teacher_hidden.any(axis=2) == scored).all()
    logits = teacher.decode(batch.tokens_in, teacher.start(teacher.encode(whole)), all_positions=True)
    found = batch.teacher_hidden.astype(np.float32) @ teacher.ops.p["decoder.token_embedding.weight"].T
    np.testing.assert_allclose(found[scored], logits[scored], atol=0.02)


@pytest.mark.parametrize("mode", ["full", "variable"])
def test_the_teachers_encoding_of_what_the_student_hears(corpus, teacher, mode):
    windows, labeller = corpus(mode, encoding_for=mode)
    loader = Batches(labeller, mode)
    batch = loader.load(batches.Draw(0, tuple(sorted(windows, key=lambda w: w.samples)[-2:]), 30))
    whole = teacher.encode(loader.mels.padded(batch.windows, 3000)).astype(np.float16)
    assert batch.teacher_xa.shape == whole.shape and batch.teacher_xa.dtype == np.float16
    for got, expected, frames in zip(batch.teacher_xa, whole, batch.frames, strict=True):
        np.testing.assert_array_equal(got[:frames], expected[:frames])
        assert not got[frames:].any()


def test_shares_make_up_the_batch(corpus):
    windows, labeller = corpus("variable")
    loader = Batches(labeller, "variable", AugmentOptions(noise_share=1))
    draw = Order(windows, "variable", 80, 0).next()
    whole = loader.load(draw)
    assert len(whole.windows) >= 3
    for ranks in (2, 3, 7):
        shares = [loader.load(draw, rank, ranks) for rank in range(ranks)]
        assert [share is None for share in shares] == [rank >= len(whole.windows) for rank in range(ranks)]
        for rank, share in enumerate(shares):
            if share is not None:
                assert share.windows == whole.windows[rank::ranks]
                np.testing.assert_array_equal(share.mel, whole.mel[rank::ranks])
                length = share.targets.shape[1]
                np.testing.assert_array_equal(share.targets, whole.targets[rank::ranks, :length])
                assert (whole.targets[rank::ranks, length:] == -1).all()


def test_a_shorter_window_of_a_batch_is_padded_with_zeros(corpus):
    windows, labeller = corpus("variable")
    short, long = sorted(windows, key=lambda w: w.samples)[:: len(windows) - 1]
    batch = Batches(labeller, "variable").load(batches.Draw(0, (short, long), long.rounded_s))
    assert batch.frames.tolist() == [50 * short.rounded_s, 50 * long.rounded_s]
    assert batch.mel[0, :, short.frames - 1].any() and not batch.mel[0, :, short.frames :].any()


@pytest.mark.parametrize("options", [AugmentOptions(noise_share=1), AugmentOptions(time_masks=1, freq_masks=1)])
def test_noise_and_masks_are_for_the_student_alone_and_change_with_the_epoch(corpus, options):
    windows, labeller = corpus("variable", encoding_for="variable")
    clean, noisy = Batches(labeller, "variable"), Batches(labeller, "variable", options, seed=5)
    draw = Order(windows, "variable", 80, 0).next()
    later = batches.Draw(1, draw.windows, draw.length_s)
    a, b, c, d = clean.load(draw), noisy.load(draw), noisy.load(draw), noisy.load(later)
    np.testing.assert_array_equal(b.mel, c.mel)
    assert (b.mel != a.mel).any() and (b.mel != d.mel).any()
    assert (Batches(labeller, "variable", options, seed=6).load(draw).mel != b.mel).any()
    for other in (b, d):
        np.testing.assert_array_equal(other.targets, a.targets)
        np.testing.assert_array_equal(other.teacher_hidden, a.teacher_hidden)
        np.testing.assert_array_equal(other.teacher_xa, a.teacher_xa)


def test_labels_that_are_not_used_leave_the_batch(corpus, teacher):
    windows, labeller = corpus("variable")
    strict = Labeller(teacher, labeller.cache, labeller.mels, LabelOptions(max_compression_ratio=1e-9))
    draw = Order(windows, "variable", 80, 0).next()
    assert Batches(strict, "variable").load(draw) is None
    unused = draw.windows[0]
    strict = Labeller(teacher, labeller.cache, labeller.mels)
    strict._verdict[unused] = False
    assert Batches(strict, "variable").load(draw).windows == draw.windows[1:]
