"""A float model -> a model in int8, by one of three schemes.

`w8a8-static`   weights and activations; an activation's scale and zero point are fixed at calibration
`w8a8-dynamic`  weights and what they are multiplied with; a row's scale is found at run time
`w8`            weights only

Weights (linears, both convolutions, the token embedding; in `w8a8-static` the positions too) are symmetric, with one
scale or one for each output channel. Biases, layer norms and gates stay float; what else does is `keep_float`.
"""

import shlex
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minigate import calibrate, checkpoint, graph, kernels, sensitivity, transforms
from minigate.calibrate import CalibrationOptions, Speech
from minigate.command import check_stdout, run_main, say, show
from minigate.errors import UsageError
from minigate.int8weights import dequantize, quantize_weights, smallest_float
from minigate.model import find
from minigate.quantizeoptions import PROG, WEIGHTS, QuantizeOptions, name_flag, parse
from minigate.quantizereport import inspect, summary
from minigate.report import check_target

NO_HELPERS = QuantizeOptions().helpers


# --- by scheme


def quantize_static(metadata: Mapping, tensors: Mapping[str, np.ndarray], ranges: Mapping[str, list[float]],
                    calibration: Mapping, weights: str = WEIGHTS["w8a8-static"], keep_float: Iterable[str] = (),
                    helpers: Mapping | None = None) -> tuple[dict, dict[str, np.ndarray]]:  # fmt: skip
    """A float model, [low, high] of every point and how they were found -> metadata and tensors as `w8a8-static`.

    keep_float, helpers and errors as in `quantized`.
    """
    found = {"ranges": dict(ranges), "calibration": dict(calibration)}
    return quantized(metadata, tensors, "w8a8-static", weights, keep_float, helpers, found)


def quantize_dynamic(metadata: Mapping, tensors: Mapping[str, np.ndarray], weights: str = WEIGHTS["w8a8-dynamic"],
                     keep_float: Iterable[str] = (), helpers: Mapping | None = None
                     ) -> tuple[dict, dict[str, np.ndarray]]:  # fmt: skip
    """A float model -> its metadata and tensors as `w8a8-dynamic`; the rest as in `quantized`."""
    return quantized(metadata, tensors, "w8a8-dynamic", weights, keep_float, helpers)


def quantize_w8(metadata: Mapping, tensors: Mapping[str, np.ndarray], weights: str = WEIGHTS["w8"],
                keep_float: Iterable[str] = (), helpers: Mapping | None = None
                ) -> tuple[dict, dict[str, np.ndarray]]:  # fmt: skip
    """A float model -> its metadata and tensors as `w8`; the rest as in `quantized`."""
    return quantized(metadata, tensors, "w8", weights, keep_float, helpers)


def quantized(metadata: Mapping, tensors: Mapping[str, np.ndarray], scheme: str, weights: str,
              keep_float: Iterable[str] = (), helpers: Mapping | None = None, found: Mapping | None = None
              ) -> tuple[dict, dict[str, np.ndarray]]:  # fmt: skip
    """A float model -> metadata with its quantization, tensors. What stays float is float16 where that loses nothing.

    keep_float: as `graph.expand_keep_float` takes it; only what `checkpoint.keepable` names counts.
    helpers: what was done to the tensors before, and error_diffusion, which the kernels do. found: what calibration
    adds. UsageError for a model that is quantized already, or a layer that there is not.
    """
    check_float(metadata)
    metadata = with_quantization(metadata, scheme, weights, keep_float, helpers, found)
    return metadata, quantize_weights(metadata, tensors)


def with_quantization(metadata: Mapping, scheme: str, weights: str, keep_float: Iterable[str],
                      helpers: Mapping | None = None, found: Mapping | None = None) -> dict:  # fmt: skip
    """A float model's metadata -> that of the quantized one; arguments as of `quantized`."""
    helpers = {**NO_HELPERS, **(helpers or {})}
    if helpers["error_diffusion"] and scheme != "w8a8-static":
        raise UsageError(f"helpers: expected no error_diffusion in {scheme}, got it")
    layers = checkpoint.keepable(metadata["dims"], scheme)
    kept = [module for module in graph.expand_keep_float(keep_float, metadata["dims"]) if module in layers]
    quantization = {"scheme": scheme, "weights": weights, "keep_float": kept,
                    "helpers": helpers, **(found or {})}  # fmt: skip
    return {**metadata, "quantization": quantization}


def check_float(metadata: Mapping) -> None:
    """Raise UsageError for a model that is quantized already."""
    if metadata.get("quantization"):
        raise UsageError(f"model: expected a float model, got one quantized as {metadata['quantization']['scheme']}")


# --- with calibration and helpers


@dataclass(frozen=True)
class Prepared:
    """A float model that the helpers have changed, without changing what it computes, and what calibration found."""

    metadata: dict
    tensors: Mapping[str, np.ndarray]
    options: QuantizeOptions
    found: Mapping  # ranges and calibration; empty unless w8a8-static
    means: Mapping[str, np.ndarray] | None  # mean inputs of the linears, for bias correction
    moments: Mapping[str, np.ndarray] | None  # E[x xᵀ] of them, or multiples, for error feedback

    def quantization(self, keep_float: Iterable[str]) -> dict:
        """Metadata with the quantization in which these layers stay float."""
        o = self.options
        return with_quantization(self.metadata, o.scheme, o.weights, keep_float, o.helpers, self.found)

    def quantized(self, keep_float: Iterable[str]) -> tuple[dict, dict[str, np.ndarray]]:
        """-> metadata and tensors of the quantized model."""
        metadata = self.quantization(keep_float)
        out = quantize_weights(metadata, self.tensors, self.moments)
        if self.means is not None:
            rounded = dequantize(metadata, out)[1]
            corrected = transforms.bias_correction(self.metadata, self.tensors, rounded, self.means)
            out |= {name: smallest_float(corrected[name]) for name in out if name.endswith(".bias")}
        return metadata, out


def prepare(
    metadata: dict, tensors: Mapping[str, np.ndarray], options: QuantizeOptions, calibration: CalibrationOptions,
    speech: Speech | None = None, shown: bool = False,
) -> Prepared:  # fmt: skip
    """A float model -> what `Prepared.quantized` makes the quantized one of.

    speech: needed where options.needs_speech. shown: progress on stderr. UsageError for a model that is quantized
    already; FileError where calibration finds values that are not finite.
    """
    check_float(metadata)
    graph.expand_keep_float(options.keep_float, metadata["dims"])
    if options.needs_speech and speech is None:
        raise UsageError("speech: expected a calibration set, got none")
    if options.equalize:
        metadata, tensors = transforms.equalize(metadata, tensors)
    if options.rotate:
        metadata, tensors = transforms.rotate(metadata, tensors, calibration.seed)
    if options.smoothquant is not None:
        maxima = calibrate.channel_maxima(calibrate.observe(metadata, tensors, speech, shown=shown))
        metadata, tensors = transforms.smoothquant(metadata, tensors, maxima, options.smoothquant)
    static, found, means, moments = options.scheme == "w8a8-static", {}, None, None
    if static or options.bias_correction or options.error_feedback:
        histograms = static and calibrate.needs_histograms(calibration)
        observed = calibrate.observe(metadata, tensors, speech, histograms, options.bias_correction,
                                     options.error_feedback, shown)  # fmt: skip
        means = calibrate.mean_inputs(observed) if options.bias_correction else None
        moments = observed.squares if options.error_feedback else None
        if static:
            found = {"ranges": calibrate.find_ranges(observed, speech, calibration),
                     "calibration": calibrate.description(speech, calibration)}  # fmt: skip
    return Prepared(metadata, tensors, options, found, means, moments)


# --- the command line


def run(argv: Sequence[str]) -> int:
    """Arguments -> exit code 0. Raises UsageError and FileError."""
    args, options, calibration = parse(argv)
    check_stdout()
    if args.inspect is not None:
        file = checkpoint.read(find(args.inspect))
        show(inspect(file.metadata, file.tensors))
        return 0
    if args.output:
        check_target(args.output, "--output")
    if args.threads is not None:
        kernels.set_threads(args.threads)
    file = checkpoint.read(find(args.model))
    check_float(file.metadata)
    kept = graph.expand_keep_float(options.keep_float, file.metadata["dims"])
    speech = None
    if options.needs_speech or args.sensitivity or args.auto_keep_float is not None:
        speech = Speech(args.calibration, file.metadata, calibration.batches, calibration.seed, _warn)
    prepared = prepare(file.metadata, file.tensors, options, calibration, speech, shown=not args.quiet)
    kept = _by_layer(prepared, kept, speech, args)
    if args.output:
        metadata, tensors = prepared.quantized(kept)
        provenance = {**metadata["provenance"], "quantized_by": _command(argv)}
        metadata = {**metadata, "name": args.output.stem, "provenance": provenance}
        checkpoint.write(args.output, metadata, tensors)
        show(f"{args.output}: {summary(metadata, tensors)}")
    return 0


def _by_layer(prepared: Prepared, kept: list[str], speech: Speech, args: Namespace) -> list[str]:
    """--sensitivity and --auto-keep-float -> what stays in float."""
    if not args.sensitivity and args.auto_keep_float is None:
        return kept
    judge = sensitivity.Judge(*prepared.quantized([]), prepared.tensors, speech, shown=not args.quiet)
    kept, ranking = [layer for layer in kept if layer in judge.layers], None
    if args.sensitivity:
        whole, costs = sensitivity.sensitivity(judge, kept)
        show(sensitivity.table(whole, costs))
        ranking = [cost.layer for cost in costs]
    if args.auto_keep_float is None:
        return kept
    chosen, cost = sensitivity.auto_keep_float(judge, args.auto_keep_float, kept, ranking)
    show(f"kept in float: {' '.join(chosen) or 'nothing'}; KL {cost:.5f} nats per token")
    return chosen


def _warn(line: str) -> None:
    say(PROG, line, "warning")


def _command(argv: Sequence[str]) -> str:
    """For the provenance: the command line, paths without their folders."""
    words = []
    for word in argv:
        flag, is_assigned, value = word.rpartition("=")
        words.append(f"{flag}{is_assigned}{Path(value).name if '/' in value else value}")
    return shlex.join([*PROG.split(), *words])


def main(argv: list[str] | None = None) -> int:
    """Arguments (default: the command line's) -> exit code, after one line on standard error if that is not 0."""
    return run_main(PROG, lambda: _with_flags(sys.argv[1:] if argv is None else argv))


def _with_flags(argv: Sequence[str]) -> int:
    try:
        return run(argv)
    except UsageError as error:
        raise name_flag(error) from None


if __name__ == "__main__":
    sys.exit(main())
