"""What is said about a quantized model: shares, sizes by part, ranges."""

import numpy as np
import pytest

from minigate import checkpoint, graph, quantizereport
from tests.test_quantize import quantized
from tests.toy import DIMS, toy_model


def rows_of(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}


def test_parts_hold_every_byte_once():
    metadata, tensors = quantized("w8a8-static", "per_head")
    head, *rows = quantizereport.size_rows(metadata, tensors)
    assert head == ("part", "values", "int8 kB", "float32 kB", "uint8 kB", "kB")
    names = [row[0] for row in rows]
    assert {"encoder.conv1", "encoder.positional_embedding", "encoder.blocks.1", "decoder.token_embedding", "gates",
            "decoder.ln", "tokenizer.vocabulary", "all"} <= set(names)  # fmt: skip
    values = {row[0]: int(row[1]) for row in rows}
    assert values["all"] == sum(values[name] for name in names[:-1]) == sum(a.size for a in tensors.values())
    assert values["encoder.conv1"] == 32 * 8 * 3 + 32 + 1  # weight, bias, scale
    total = {row[0]: float(row[-1]) for row in rows}
    assert total["all"] == pytest.approx(sum(a.nbytes for a in tensors.values()) / 1e3, abs=0.1)
    assert float(rows[names.index("gates")][2]) == 0


def test_the_share_leaves_gates_out():
    for gate in ("none", "elementwise"):
        metadata, tensors = quantized("w8a8-static", gate)
        rest = {name: array for name, array in tensors.items() if ".gate." not in name}
        float_size = sum(a.nbytes for a in toy_model()[1].values())
        share = 100 * sum(a.nbytes for a in rest.values()) / float_size
        text = quantizereport.summary(metadata, tensors)
        assert f" {share:.1f} % of float32" in text and ("of gates" in text) == (gate != "none")
        assert text.startswith("w8a8-static, weights per-tensor, ")
    assert "100.0 % of float32" in quantizereport.summary(*toy_model())


def test_at_whispers_sizes_the_share_is_at_most_27_percent():
    dims = dict(n_mels=80, n_audio_ctx=1500, n_audio_state=384, n_audio_head=6, n_audio_layer=4, n_vocab=51864,
                n_text_ctx=448, n_text_state=384, n_text_head=6, n_text_layer=4)  # fmt: skip
    ranges = {point: [-1.0, 1.0] for point in graph.points(dims, "per_head")}
    for scheme in checkpoint.SCHEMES:
        for weights in ("per-tensor", "per-channel"):
            quantization = {"scheme": scheme, "weights": weights, "keep_float": [], "ranges": ranges}
            metadata = {"dims": dims, "gate": {"kind": "per_head"}, "quantization": quantization}
            sizes = {"int8": 1, "float": 4, "float32": 4}
            size = sum(int(np.prod(shape)) * sizes[kind] for name, (shape, kind)
                       in checkpoint.expected_tensors(metadata).items() if ".gate." not in name)  # fmt: skip
            assert size <= 0.27 * quantizereport.float32_bytes(metadata)


def test_inspect_prints_scheme_calibration_layers_sizes_and_ranges():
    metadata, tensors = quantized("w8a8-static", keep_float=["encoder.blocks.1.mlp.2"],
                                  helpers={"smoothquant": 0.5, "equalize": True})  # fmt: skip
    tensors[checkpoint.INPUT_SCALE] = np.ones(32, np.float32)
    text = quantizereport.inspect(metadata, tensors)
    assert text.startswith("toy: w8a8-static, weights per-tensor, ")
    assert "helpers: SmoothQuant 0.5, equalization\n" in text
    assert "calibration: minmax over 16 batches, 8 different windows, seed 0, sound 0\n" in text
    assert "kept in float: encoder.blocks.1.mlp.2\n" in text
    rows = rows_of(text)
    scale, zero_point = graph.grid(-1, 2.5)
    assert rows["mel"] == ["-1", "2.5", f"{scale:.5g}", str(zero_point), "int8"]
    assert rows["encoder.blocks.1.mlp.2"][-1] == "float" and rows["encoder.blocks.1.mlp.0"][-1] == "float"
    assert graph.points(DIMS, "none").keys() <= rows.keys() and "all" in rows


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8"])
def test_inspect_of_schemes_without_ranges(scheme):
    text = quantizereport.inspect(*quantized(scheme))
    assert "kept in float: nothing" in text and "helpers: none" in text and "calibration" not in text
    assert "zero point" not in text


def test_inspect_of_a_float_model_and_of_a_file_from_before_there_were_helpers():
    assert quantizereport.inspect(*toy_model()).startswith("toy: float, ")
    metadata, tensors = quantized("w8a8-dynamic")
    del metadata["quantization"]["helpers"]
    assert "helpers: none" in quantizereport.inspect(metadata, tensors)
