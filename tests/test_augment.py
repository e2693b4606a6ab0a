"""What augmentation does to sound and log-mel, that nothing is varied unless asked for, and that it is repeatable."""

from fractions import Fraction

import numpy as np
import pytest

from minigate import augment
from minigate.augment import AugmentOptions
from minigate.errors import UsageError

ID = "00ff" * 8  # of a window


def stream(seed=0, epoch=0, window_id=ID, use=augment.NOISE):
    return augment.generator(seed, epoch, window_id, use)


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(16000 * seconds)) / 16000).astype(np.float32)


def loudest_hz(audio: np.ndarray) -> float:
    return np.fft.rfftfreq(len(audio), 1 / 16000)[np.abs(np.fft.rfft(audio)).argmax()]


def test_nothing_is_varied_unless_asked_for():
    audio, mel = tone(440), np.random.default_rng(0).standard_normal((80, 300)).astype(np.float32)
    options = AugmentOptions()
    assert options.speeds == (1.0,) and options.gain_db == 0
    assert augment.change_speed(audio, Fraction(1)) is audio and augment.change_gain(audio, 0.0) is audio
    assert augment.add_noise(audio, options, stream()) is audio
    assert augment.spec_augment(mel, options, stream()) is mel


@pytest.mark.parametrize("speed", [0.9, 1.1, 0.5, 1.33])
def test_speed_moves_pitch_and_length(speed):
    fraction = augment.as_fraction(speed)
    fast = augment.change_speed(tone(440), fraction)
    assert fast.dtype == np.float32
    assert len(fast) == augment.sped_up_samples(16000, fraction) == np.ceil(16000 / speed)
    assert loudest_hz(fast) == pytest.approx(440 * speed, abs=2)


def test_gain_in_decibels():
    louder = augment.change_gain(tone(440), 20.0)
    np.testing.assert_allclose(louder, 10 * tone(440), rtol=1e-6)
    assert louder.dtype == np.float32


@pytest.mark.parametrize("snr_db", [0.0, 20.0])
def test_noise_has_the_ratio_asked_for(snr_db):
    audio = 0.1 * tone(440, 3)
    options = AugmentOptions(noise_share=1, noise_snr_db=(snr_db, snr_db))
    for epoch in range(4):
        noise = augment.add_noise(audio, options, stream(epoch=epoch)) - audio
        assert noise.dtype == np.float32
        assert 10 * np.log10(augment.power(audio) / augment.power(noise)) == pytest.approx(snr_db, abs=0.05)


def test_noise_share_range_and_both_colours():
    audio, options = tone(440), AugmentOptions(noise_share=0.5, noise_snr_db=(0, 10))
    noises = [augment.add_noise(audio, options, stream(epoch=e)) - audio for e in range(200)]
    noisy = [n for n in noises if n.any()]
    assert 70 < len(noisy) < 130
    snrs_db = [10 * np.log10(augment.power(audio) / augment.power(n)) for n in noisy]
    assert min(snrs_db) == pytest.approx(0, abs=1) and max(snrs_db) == pytest.approx(10, abs=1)
    low = [augment.power(np.diff(n)) / augment.power(n) < 1 for n in noisy]  # 2 for white noise
    assert 0.3 < np.mean(low) < 0.7


def test_pink_noise_loses_3_db_an_octave():
    spectrum = np.abs(np.fft.rfft(augment.pink(np.random.default_rng(0).standard_normal(1 << 16, np.float32)))) ** 2
    octaves = [10 * np.log10(spectrum[1 << i : 2 << i].mean()) for i in range(8, 15)]
    np.testing.assert_allclose(np.diff(octaves), -3.01, atol=0.8)


def test_silence_stays_silent():
    silence = np.zeros(1000, np.float32)
    assert not augment.add_noise(silence, AugmentOptions(noise_share=1), stream()).any()


def test_masks_are_stretches_of_the_mean():
    mel = np.random.default_rng(0).standard_normal((80, 500)).astype(np.float32)
    options = AugmentOptions(time_masks=1, time_mask_s=0.5)
    widths = []
    for epoch in range(100):
        masked = augment.spec_augment(mel, options, stream(epoch=epoch))
        columns = np.flatnonzero((masked != mel).any(axis=0))
        assert (masked[:, columns] == mel.mean()).all()
        assert not len(columns) or np.ptp(columns) == len(columns) - 1
        widths.append(len(columns))
    assert min(widths) < 5 and 45 < max(widths) <= 50
    masked = augment.spec_augment(mel, AugmentOptions(freq_masks=2, freq_mask_bins=10), stream())
    rows = np.flatnonzero((masked != mel).any(axis=1))
    assert 0 < len(rows) <= 20 and (masked[rows] == mel.mean()).all()


def test_a_time_mask_covers_a_fifth_of_a_short_window_at_most():
    mel = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32)
    options = AugmentOptions(time_masks=1, time_mask_s=30)
    covered = [(augment.spec_augment(mel, options, stream(epoch=e)) != mel).any(axis=0).sum() for e in range(60)]
    assert max(covered) == 10


def test_what_is_drawn_follows_from_seed_epoch_window_and_use():
    same = [stream().random(3).tolist() for _ in range(2)]
    other = [stream(seed=1), stream(epoch=1), stream(window_id="1" * 32), stream(use=augment.MASKS)]
    assert same[0] == same[1]
    assert len({tuple(same[0]), *(tuple(random.random(3).tolist()) for random in other)}) == 5


@pytest.mark.parametrize("options, said", [
    (dict(speeds=()), "speeds: expected different numbers from 0.5 to 2.0, got ()"),
    (dict(speeds=(1.0, 3.0)), "speeds: expected"),
    (dict(speeds=(1.0, 1.0)), "speeds: expected"),
    (dict(gain_db=-1), "gain_db: expected 0 to 60, got -1"),
    (dict(noise_share=1.5), "noise_share: expected 0 to 1, got 1.5"),
    (dict(noise_share=float("nan")), "noise_share: expected 0 to 1, got nan"),
    (dict(noise_snr_db=(10, 5)), "noise_snr_db: expected two numbers in ascending order, got (10, 5)"),
    (dict(noise_snr_db=(10,)), "noise_snr_db: expected two numbers in ascending order, got (10,)"),
    (dict(time_masks=-1), "time_masks: expected 0 to 100, got -1"),
])  # fmt: skip
def test_values_out_of_range(options, said):
    with pytest.raises(UsageError) as error:
        AugmentOptions(**options)
    assert said in str(error.value)
