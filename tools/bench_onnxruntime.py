"""ONNX Runtime's integer product beside ours, for bench_kernels.py: in its own interpreter, which needs onnx too.

usage: PYTHON tools/bench_onnxruntime.py THREADS

A line "M N K REPEATS" is answered by a line with the seconds of one product, the mean of so many: MatMulInteger of
unsigned activations and signed constant weights without zero points, so nothing but the product. The first line of a
size is preceded by a check against NumPy.
"""

import sys
import time
from functools import cache

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

THREADS = int(sys.argv[1])


@cache
def product(m: int, n: int, k: int):
    """-> a function of nothing, checked."""
    rng = np.random.default_rng(0)
    w = rng.integers(-127, 128, (k, n)).astype(np.int8)
    a = rng.integers(0, 256, (m, k)).astype(np.uint8)
    inputs = [helper.make_tensor_value_info("a", TensorProto.UINT8, [m, k])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT32, [m, n])]
    node = helper.make_node("MatMulInteger", ["a", "w"], ["y"])
    graph = helper.make_graph([node], "product", inputs, outputs, [onnx.numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads spin in a call, not after it
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    if not np.array_equal(session.run(None, {"a": a})[0], a.astype(float) @ w.astype(float)):
        sys.exit(f"bench_onnxruntime: {m} x {n} x {k}: not what NumPy computes")
    return lambda: session.run(None, {"a": a})


def main() -> None:
    print(onnxruntime.__version__, flush=True)
    for line in sys.stdin:
        *sizes, repeats = map(int, line.split())
        run = product(*sizes)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        print((time.perf_counter() - start) / repeats, flush=True)


if __name__ == "__main__":
    main()
