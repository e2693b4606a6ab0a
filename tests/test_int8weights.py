"""Weights to int8 and back."""

import numpy as np
import pytest

from minigate import int8weights, quantize
from tests.toy import toy_model


@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_come_back_within_half_a_step(per_channel):
    w = np.random.default_rng(0).standard_normal((7, 5, 3)).astype(np.float32)
    w[3] = 0
    q, scale = int8weights.quantize_weight(w, per_channel)
    assert q.dtype == np.int8 and scale.shape == ((7,) if per_channel else ())
    assert np.abs(q).max() == 127 and not q[3].any()
    step = np.broadcast_to(scale.reshape(-1, 1, 1), w.shape)
    assert (np.abs(q * step - w) <= 0.5001 * step).all()
    if per_channel:
        assert scale[3] == 1
        assert (np.abs(q).max(axis=(1, 2))[[0, 1, 2, 4, 5, 6]] == 127).all()


def test_dequantized_model_has_the_float_models_tensors():
    metadata, tensors = toy_model("per_head")
    quantized_metadata, quantized = quantize.quantize_dynamic(metadata, tensors)
    int8 = {n for n, a in quantized.items() if a.dtype == np.int8}
    assert "encoder.conv1.weight" in int8 and "decoder.token_embedding.weight" in int8
    assert not any(".gate." in n or "positional" in n or "_ln" in n for n in int8)
    back_metadata, back = int8weights.dequantize(quantized_metadata, quantized)
    assert back_metadata["quantization"] is None and back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].shape == array.shape
        np.testing.assert_allclose(back[name], array, atol=np.abs(array).max() / 127 if name in int8 else 0, rtol=0)


def test_float16_only_where_it_loses_nothing():
    assert int8weights.smallest_float(np.float32([1, 0.5, -2048])).dtype == np.float16
    assert int8weights.smallest_float(np.float32([1, 0.1])).dtype == np.float32
    assert int8weights.smallest_float(np.float32([1e6])).dtype == np.float32


def test_the_smallest_numbers_have_a_scale_that_can_be_divided_by():
    q, scale = int8weights.quantize_weight(np.full((2, 3), 1e-42, np.float32))
    assert scale.tolist() == [1, 1] and not q.any()
