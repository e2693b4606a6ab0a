#!/usr/bin/env bash
# Tests on an extension that is built another way, in a copy of the sources: that of this tree stays as it is.
# usage: bash tests/rebuilt.sh FOLDER HOW     (gcc; run with the interpreter whose packages are to be used on the PATH)
#
#   sanitized   the kernel tests under AddressSanitizer and UBSan
#   emulated    all that runs on AMX, whose tiles are plain C here (tests/isas/amxemulation.h), and on AVX-VNNI, whose
#               instruction is AVX-512's here; and the sample transcribed on both
set -euo pipefail
folder=$1 how=$2
mkdir -p "$folder"
cp -r setup.py pyproject.toml csrc minigate tests tools weights "$folder/"
cd "$folder"
rm -f minigate/_kernels*.so
pip install -q 'setuptools>=70.1' cffi
build() { MINIGATE_REQUIRE_EXTENSION=1 MINIGATE_CFLAGS="$1" python setup.py -q build_ext --inplace; }
case $how in
sanitized)
    build "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
    # Python itself leaks by design, and its allocator hides overruns unless it is plain malloc.
    export ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc LD_PRELOAD="$(gcc -print-file-name=libasan.so)"
    python -m pytest -q -p no:cacheprovider tests/test_kernels*.py tests/test_csrc.py \
        tests/test_decoder_kernels.py tests/test_gate_kernels.py tests/test_heard_kernels.py
    ;;
emulated)
    build "-DMG_AMX_EMULATED -DMG_EVEX_VNNI -I$PWD/tests/isas"
    if [ "$(python -c 'from minigate import kernels; print(kernels.use_isa())')" != amx ]; then
        echo "not to be emulated: avx512vnni, which runs the rest of both, is not usable"
        exit 0
    fi
    python -m pytest -q -p no:cacheprovider -k 'amx or avxvnni' --ignore=tests/test_isas.py tests
    for isa in amx avxvnni; do MINIGATE_ISA=$isa python -m minigate.transcribe weights/sample.wav; done
    ;;
*)
    echo "rebuilt.sh: expected sanitized or emulated, got $how" >&2
    exit 2
    ;;
esac
