"""The whole model's backward: float64 gradients of every parameter, and the discipline of the stack."""

import numpy as np
import pytest

from minigate import attention, model, tape
from tests.gradients import check_gradient
from tests.toy import DIMS, Plain, toy_model

RTOL = 1e-5  # of the whole model


def forward(ops, dims, mel, tokens):
    """-> logits (B, T, V)."""
    cross = model.cross_keys_values(ops, dims, model.encoder(ops, dims, mel))
    x = model.decoder(ops, dims, tokens, model.Whole(cross))
    return ops.logits(ops.norm("decoder.ln", x))


def backward(ops, dims, dlogits):
    dx = ops.norm_backward("decoder.ln", ops.linear_backward("decoder.token_embedding", dlogits)[0])
    dcross = model.decoder_backward(ops, dims, dx)
    model.encoder_backward(ops, dims, model.cross_keys_values_backward(ops, dims, dcross))


def inputs():
    rng = np.random.default_rng(0)
    mel = rng.standard_normal((2, DIMS["n_mels"], 2 * DIMS["n_audio_ctx"]))
    return mel, rng.integers(0, DIMS["n_vocab"], (2, 6)), rng.standard_normal((2, 6, DIMS["n_vocab"]))


@pytest.mark.parametrize("kind", attention.GATE_KINDS)
def test_gradient_of_every_parameter(kind):
    metadata, tensors = toy_model(kind)
    for name in tensors:
        if name.endswith("gate.0.bias"):
            tensors[name] = 8 * np.sign(tensors[name])  # far from ReLU's kink, where differences have no limit
    dims, (mel, tokens, dlogits) = model.Dims(**metadata["dims"]), inputs()
    ops = tape.Recorded(metadata, tensors, np.float64)
    logits = forward(ops, dims, mel, tokens)
    np.testing.assert_allclose(logits, Plain(metadata, tensors).decode(tokens, Plain(metadata, tensors).encode(mel)))
    backward(ops, dims, dlogits)
    assert not ops.stack
    trained = {n for n in ops.p if n != "encoder.positional_embedding"}
    assert ops.grads.keys() == trained
    rng = np.random.default_rng(1)
    checked = trained if kind == "per_head" else {n for n in trained if ".gate." in n or "blocks.0.attn" in n}
    for name in sorted(checked):
        value = ops.p[name]

        def f(x, name=name):
            ops.p[name][...] = x
            return float((dlogits * forward(ops, dims, mel, tokens)).sum())

        start = value.copy()
        check_gradient(f, start, ops.grads[name], rng, RTOL)
        value[...] = start
        ops.stack.clear()


def test_backward_out_of_order_is_named():
    metadata, tensors = toy_model()
    dims, (mel, tokens, dlogits) = model.Dims(**metadata["dims"]), inputs()
    ops = tape.Recorded(metadata, tensors)
    forward(ops, dims, mel.astype(np.float32), tokens)
    with pytest.raises(RuntimeError, match="expected decoder.token_embedding, the newest forward, got decoder.ln"):
        ops.norm_backward("decoder.ln", dlogits)
