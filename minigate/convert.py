"""python -m minigate.convert SRC OUT.safetensors [--dtype float32|float16]: any Whisper checkpoint -> a model file.

Tensors are converted and written one by one, so memory stays at the size of the largest.
"""
import hashlib
import math
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np

from minigate import checkpoint, readers
from minigate.command import check_stdout, run_main, show
from minigate.errors import UsageError
from minigate.options import ArgumentParser
from minigate.tensorfile import Entry, LazyTensors
from minigate.tokenizer import pack_vocabulary

PROG = "python -m minigate.convert"
SHOW_PROGRESS = 500_000_000  # bytes of output from which on a progress bar is shown
CHUNK = 1 << 20  # bytes hashed at a time


def convert(src: str | Path, out: str | Path, dtype: str = "float32") -> checkpoint.ModelFile:
    """Read any supported source, write out with float weights of dtype, return the new file, read back and checked.

    The model's name is out's stem. Raises FileError for what cannot be read or written; then out is as it was before.
    """
    src, out = Path(src), Path(out)
    source = readers.read_any(src)
    provenance = {"source": src.absolute().name, "sha256": _sha256(source.files), "layout": source.kind,
                  "command": f"python -m minigate.convert {src.absolute().name} {out.name} --dtype {dtype}"}
    if source.provenance is not None:
        provenance["made_from"] = source.provenance
    metadata = checkpoint.make_metadata(
        out.stem, source.dims, provenance, gate=source.gate, audio_context=source.audio_context,
        alignment_heads=source.alignment_heads, suppress_tokens=source.suppress_tokens)
    vocabulary = pack_vocabulary(source.vocabulary)
    tensors = LazyTensors(source.tensors.entries | {
        checkpoint.VOCABULARY: Entry(vocabulary.shape, vocabulary.dtype, lambda: vocabulary)})
    total = vocabulary.nbytes + np.dtype(dtype).itemsize * sum(
        math.prod(entry.shape) for entry in source.tensors.entries.values())
    bar = _progress_bar(total) if total >= SHOW_PROGRESS else None
    try:
        checkpoint.write(out, metadata, tensors, dtype, bar.update if bar else None)
    finally:
        if bar:
            bar.close()
    return checkpoint.read(out)


def _sha256(files: list[Path]) -> str | dict[str, str]:
    """The hash of the file with the weights; of several, each by its name."""
    def one(path: Path) -> str:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while data := file.read(CHUNK):
                digest.update(data)
        return digest.hexdigest()

    return one(files[0]) if len(files) == 1 else {path.name: one(path) for path in files}


def _progress_bar(total: int) -> object:
    """A tqdm bar on stderr; None where tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, unit="B", unit_scale=True, desc="writing", file=sys.stderr)


def build_parser() -> ArgumentParser:
    """The command line of `python -m minigate.convert`."""
    parser = ArgumentParser(prog=PROG, description="Make a model file of a Whisper checkpoint.")
    parser.add_argument("src", metavar="SRC", type=Path,
                        help="an OpenAI .pt file, the folder of a Hugging Face or CTranslate2 model, or a model file")
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="the file to write; its stem names the model")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32",
                        help="of the weights in the file (default: float32)")
    return parser


def run(args: Namespace) -> int:
    """Parsed arguments -> exit code 0, the new file named on standard output. Raises UsageError and FileError."""
    if args.out.suffix != ".safetensors":
        raise UsageError(f"OUT: expected a name that ends in .safetensors, got {args.out}")
    check_stdout()
    model = convert(args.src, args.out, args.dtype)
    parameters = sum(math.prod(shape) for shape in checkpoint.tensor_shapes(
        model.metadata["dims"], model.metadata["gate"]["kind"]).values())
    show(f"{args.out}: {model.metadata['name']}, {parameters} parameters, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Arguments (default: the command line's) -> exit code, after one line on standard error if that is not 0."""
    return run_main(PROG, lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
