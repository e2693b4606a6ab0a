#!/usr/bin/env python3
"""Make the embedded default model: a float model file -> `w8a8-dynamic`, weights per channel.

usage: python -m minigate.convert tiny.en.pt tiny.en.safetensors
       python tools/make_embedded.py --license MIT tiny.en.safetensors weights/tiny.en-w8a8-dynamic.safetensors
"""

import argparse
import hashlib
import sys
from pathlib import Path

from minigate import checkpoint
from minigate.errors import FileError, UsageError
from minigate.quantize import quantize_dynamic
from minigate.quantizereport import size_report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a float model file, made by python -m minigate.convert")
    parser.add_argument("output", help="the quantized model file")
    parser.add_argument("--license", help="of the weights, for the file's provenance (default: what the source says)")
    args = parser.parse_args(argv)
    try:
        file = checkpoint.read(args.source)
        metadata, tensors = quantize_dynamic(file.metadata, file.tensors)
        metadata["name"] = Path(args.output).stem
        metadata["provenance"] = {
            **metadata["provenance"],
            **({"license": args.license} if args.license else {}),
            "quantized_by": f"python tools/make_embedded.py {Path(args.source).name} {Path(args.output).name}",
        }
        checkpoint.write(args.output, metadata, tensors)
    except (FileError, UsageError) as error:
        print(f"make_embedded: {error}", file=sys.stderr)
        return 1 if isinstance(error, FileError) else 2
    digest = hashlib.sha256(Path(args.output).read_bytes()).hexdigest()
    print(f"{args.output}: {size_report(tensors)}, sha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
