"""Sound and log-mel -> the same, varied: speed, gain, noise, SpecAugment. All of it is off unless asked for.

Speed and gain change what is heard, so they belong to a window (`data.py`) and the teacher labels their result. Noise
and SpecAugment are for the student's input alone: the teacher's labels are those of the clean window. They are drawn
from (seed, epoch, window id), so that a resumed run draws what the first one would have drawn.

Shapes: n samples at 16 kHz, T frames of 10 ms.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from minigate.errors import UsageError

SPEED_RANGE = (0.5, 2.0)
FRAMES_PER_S = 100  # of the log-mel
TIME_MASK_SHARE = 0.2  # of the window's own frames that a single time mask covers at most, SpecAugment's p
NOISE, MASKS = 0, 1  # what a random stream is for


@dataclass(frozen=True)
class AugmentOptions:
    """What is varied. Raises UsageError for a value outside its range."""

    speeds: tuple[float, ...] = (1.0,)  # every utterance once at each: 0.9 is slower and lower; not 1: no timestamps
    gain_db: float = 0.0  # each utterance is made louder or softer by up to so many dB, once and for all
    noise_share: float = 0.0  # share of the student's windows with noise, drawn anew each epoch
    noise_snr_db: tuple[float, float] = (5.0, 30.0)  # least and most signal-to-noise ratio, dB over the whole window
    time_masks: int = 0  # per window of the student
    time_mask_s: float = 1.0  # longest time mask, seconds
    freq_masks: int = 0  # per window of the student
    freq_mask_bins: int = 27  # widest frequency mask, mel bands

    def __post_init__(self):
        low, high = SPEED_RANGE
        speeds = tuple(self.speeds)
        if not speeds or len(set(speeds)) < len(speeds) or not all(low <= s <= high for s in speeds):
            raise UsageError(f"speeds: expected different numbers from {low} to {high}, got {self.speeds!r}")
        ratios = tuple(self.noise_snr_db)
        if len(ratios) != 2 or not -math.inf < ratios[0] <= ratios[1] < math.inf:
            raise UsageError(f"noise_snr_db: expected two numbers in ascending order, got {self.noise_snr_db!r}")
        for name, top in (("gain_db", 60), ("noise_share", 1), ("time_masks", 100), ("time_mask_s", 30),
                          ("freq_masks", 100), ("freq_mask_bins", 128)):  # fmt: skip
            if not 0 <= getattr(self, name) <= top:
                raise UsageError(f"{name}: expected 0 to {top}, got {getattr(self, name)!r}")


def generator(seed: int, epoch: int, window_id: str, use: int) -> np.random.Generator:
    """The random stream of a window (id in hexadecimal) in an epoch, a different one for each use."""
    return np.random.default_rng([seed, epoch, int(window_id, 16), use])


# --- what the teacher hears too


def as_fraction(speed: float) -> Fraction:
    """0.9 -> 9/10. Two decimals count."""
    return Fraction(speed).limit_denominator(100)


def sped_up_samples(n: int, speed: Fraction) -> int:
    """How many samples `change_speed` makes of n."""
    return math.ceil(n / speed)


def change_speed(audio: np.ndarray, speed: Fraction) -> np.ndarray:
    """audio (n,) float32 -> (ceil(n / speed),) float32: played faster or slower, the pitch goes along."""
    if speed == 1:
        return audio
    from scipy.signal import resample_poly

    return resample_poly(audio, speed.denominator, speed.numerator).astype(np.float32, copy=False)


def change_gain(audio: np.ndarray, gain_db: float) -> np.ndarray:
    """audio (n,) float32 -> the same by gain_db louder. Nothing is clipped."""
    return audio if gain_db == 0 else audio * np.float32(10 ** (gain_db / 20))


# --- what the student alone hears


def add_noise(audio: np.ndarray, options: AugmentOptions, random: np.random.Generator) -> np.ndarray:
    """audio (n,) float32 -> the same, or in noise_share of all cases with white or pink noise (even chances) added.

    The ratio is that of the mean powers over the whole of audio, uniform in decibels. Digital silence stays silent.
    """
    if random.random() >= options.noise_share:
        return audio
    noise = random.standard_normal(len(audio), np.float32)
    if random.random() < 0.5:
        noise = pink(noise)
    snr_db = random.uniform(*options.noise_snr_db)
    return audio + noise * np.float32(math.sqrt(power(audio) / power(noise)) * 10 ** (-snr_db / 20))


def power(audio: np.ndarray) -> float:
    """audio (n,) -> mean of its squares."""
    return float(np.mean(np.square(audio, dtype=np.float64)))


def pink(white: np.ndarray) -> np.ndarray:
    """White noise (n,) float32 -> pink noise: its power falls with 1 / frequency, without a constant part."""
    spectrum = np.fft.rfft(white)
    spectrum[0] = 0
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    return np.fft.irfft(spectrum, len(white)).astype(np.float32)


def spec_augment(mel: np.ndarray, options: AugmentOptions, random: np.random.Generator) -> np.ndarray:
    """mel (n_mels, T), a window's own frames -> a copy with bands and stretches replaced by its mean.

    Width uniform from 0 to the option's, then place uniform: Park et al., arXiv 1904.08779, without the time warp.
    Nothing is asked: mel itself.
    """
    if not (options.time_masks or options.freq_masks):
        return mel
    n_mels, frames = mel.shape
    masked, mean = mel.copy(), mel.mean()
    widest = min(round(options.time_mask_s * FRAMES_PER_S), int(TIME_MASK_SHARE * frames))
    for _ in range(options.time_masks):
        masked[:, _stretch(random, widest, frames)] = mean
    for _ in range(options.freq_masks):
        masked[_stretch(random, min(options.freq_mask_bins, n_mels), n_mels)] = mean
    return masked


def _stretch(random: np.random.Generator, widest: int, size: int) -> slice:
    width = int(random.integers(0, widest + 1))
    start = int(random.integers(0, size - width + 1))
    return slice(start, start + width)
