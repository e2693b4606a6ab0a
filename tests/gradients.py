"""Is a gradient right? One random direction, float64, against differences of fourth order."""

from collections.abc import Callable

import numpy as np

STEP = 1e-4  # error of the differences: STEP⁴ of the fifth derivative, and float64's rounding over STEP
RTOL = 1e-6


def check_gradient(
    f: Callable[[np.ndarray], float], x: np.ndarray, dx: np.ndarray, rng: np.random.Generator, rtol: float = RTOL
) -> None:
    """AssertionError unless dx is the gradient of f at x: f takes an array like x and returns a number, all in float64.

    Along a random u, |(f(x + hu) - f(x - hu)) / 2h, extrapolated to h = 0, - <dx, u>| must be at most rtol |dx|, as
    <dx, u> is normally distributed with deviation |dx|. f is called on new arrays; what it holds besides x stays fixed.
    To check a layer y = layer(x), let f be x -> sum(dy * layer(x)) for a fixed random dy.
    """
    assert x.dtype == dx.dtype == np.float64, f"expected float64, got x {x.dtype}, dx {dx.dtype}"
    assert x.shape == dx.shape, f"expected a gradient of shape {x.shape}, got {dx.shape}"
    u = rng.standard_normal(x.shape)
    slopes = [(f(x + h * u) - f(x - h * u)) / (2 * h) for h in (STEP, 2 * STEP)]
    numeric, given = (4 * slopes[0] - slopes[1]) / 3, float((dx * u).sum())
    bound = rtol * np.linalg.norm(dx)
    assert abs(numeric - given) <= bound, f"slope: expected {numeric:.12g} +- {bound:.2g}, got {given:.12g}"
