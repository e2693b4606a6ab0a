#!/usr/bin/env bash
# The kernel tests under AddressSanitizer and UBSan, in a copy of the sources: the extension of this tree stays as it is.
# usage: bash tests/sanitize.sh FOLDER     (gcc; run with the interpreter whose packages are to be used on the PATH)
set -euo pipefail
folder=$1
mkdir -p "$folder"
cp -r setup.py pyproject.toml csrc minigate tests tools "$folder/"
mkdir -p "$folder/weights"
cd "$folder"
rm -f minigate/_kernels*.so
export MINIGATE_REQUIRE_EXTENSION=1
pip install -q 'setuptools>=70.1' cffi
MINIGATE_CFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all" python setup.py -q build_ext --inplace
# Python itself leaks by design, and its allocator hides overruns unless it is plain malloc.
export ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc LD_PRELOAD="$(gcc -print-file-name=libasan.so)"
python -m pytest -q -p no:cacheprovider tests/test_kernels*.py tests/test_csrc.py
