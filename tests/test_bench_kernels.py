"""tools/bench_kernels.py and tools/benchcases.py: that a wrong result is noticed, and the table."""

import pytest

from minigate import kernels, reference
from tools import bench_kernels, benchcases

WRONG = {"matmul_int8 1500×384×384": (kernels, "matmul_int8"), "linear_int8 1500×384×384": (kernels, "linear_int8"),
         "linear_int8 1×384×384": (reference, "linear_int8"), "gelu 1500×1536": (kernels, "gelu"),
         "attention 1×1500×384, keys in bf16": (kernels, "attention"),
         "attention 1×1500×384, keys in int8": (benchcases, "attention_heard")}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    n_threads = kernels.threads()
    monkeypatch.setattr(benchcases, "ROTATED", 1 << 20)
    monkeypatch.setattr(bench_kernels, "FILL_S", 1e-4)
    yield
    kernels.set_threads(n_threads)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    try:
        return benchcases.Peaks(str(tmp_path_factory.mktemp("peaks")))
    except SystemExit as error:
        pytest.skip(str(error))


def test_without_a_compiler(tmp_path):
    with pytest.raises(SystemExit, match="needs a C compiler that has OpenMP"):
        benchcases.Peaks(str(tmp_path / "no-such-folder"))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_are_noticed(name, peaks, monkeypatch):
    next(benchcases.cases(peaks, 1, name)).check()
    module, function = WRONG[name]
    right = getattr(module, function)

    def wrong(*args, **options):
        y = right(*args, **options)
        y[-1, ..., -1] += 1
        return y

    monkeypatch.setattr(module, function, wrong)
    with pytest.raises(SystemExit, match="away from reference.py"):
        next(benchcases.cases(peaks, 1, name)).check()


@pytest.mark.parametrize("threads", [1, 3])
def test_reading(peaks, threads):
    (run,), work = peaks.reading(8 * 1001, 7, threads)
    assert (run(), work) == (7 * 1001, 8 * 7 * 1001)


def test_table(peaks, capsys):
    assert bench_kernels.main(["--threads", "1", "2", "--rounds", "2", "--only", "layer_norm 1500×384"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| layer_norm")]
    assert [row[1] for row in rows] == ["1", "2"]
    for _, _, rate, roof, share, numpy, onnxruntime in rows:
        assert rate.endswith("GB/s") and float(roof) > 0 and "to" in share and "to" in numpy and onnxruntime == " |"
