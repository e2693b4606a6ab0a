"""Every option of quantization: name, default and range, and the command line of `python -m minigate.quantize`."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from minigate.calibrate import BATCH, CalibrationOptions
from minigate.checkpoint import SCHEMES
from minigate.errors import UsageError
from minigate.options import ArgumentParser, Checks, as_number, as_whole, flag_of
from minigate.ranges import METHODS

PROG = "python -m minigate.quantize"
GRANULARITIES = ("per-tensor", "per-channel")
WEIGHTS = {"w8a8-static": "per-tensor", "w8a8-dynamic": "per-channel", "w8": "per-channel"}  # unless told


@dataclass(frozen=True)
class QuantizeOptions:
    """How a model is quantized. Raises UsageError for a value outside its range."""

    scheme: str = "w8a8-static"
    weights: str | None = None  # per-tensor or per-channel; None: what WEIGHTS says
    keep_float: tuple[str, ...] = ()  # as graph.expand_keep_float takes it
    smoothquant: float | None = None  # 0 to 1: how much of the activations' largest values moves into the weights
    bias_correction: bool = False
    equalize: bool = False
    rotate: bool = False
    error_feedback: bool = False
    error_diffusion: bool = False

    def __post_init__(self):
        check = Checks(self)
        check.choice("scheme", SCHEMES)
        if self.weights is None:
            check.set("weights", WEIGHTS[self.scheme])
        check.choice("weights", GRANULARITIES)
        check.number("smoothquant", 0, 1, optional=True)
        check.set("keep_float", tuple(self.keep_float))
        if self.error_diffusion and self.scheme != "w8a8-static":
            raise UsageError(f"error_diffusion: expected w8a8-static, whose probabilities it rounds, got {self.scheme}")

    @property
    def helpers(self) -> dict:
        """For the metadata's `helpers`."""
        names = ("smoothquant", "bias_correction", "equalize", "rotate", "error_feedback", "error_diffusion")
        return {name: getattr(self, name) for name in names}

    @property
    def needs_speech(self) -> bool:
        """Whether there must be a calibration set."""
        looks = self.bias_correction or self.error_feedback or self.smoothquant is not None
        return looks or self.scheme == "w8a8-static"


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog=PROG, description="Make an int8 model of a float one. Progress goes to standard "
                            "error, the file written and what was found to standard output.")
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="float model file (python -m minigate.convert makes one)")
    add("--output", metavar="OUT", type=Path, help="the file to write, which ends in .safetensors; its stem names the "
        "model; not needed with --sensitivity")
    add("--inspect", metavar="FILE", help="print how a model file is quantized, ranges and sizes included, and do "
        "nothing else")
    add("--scheme", choices=SCHEMES, default="w8a8-static", help="w8a8-static: everything in integers, activations by "
        "ranges that calibration finds; w8a8-dynamic: activations by their rows at run time; w8: weights only "
        "(default: w8a8-static)")
    add("--weights", choices=GRANULARITIES, help="scales of the weights (default: per-tensor for w8a8-static, "
        "per-channel for the others)")
    add("--keep-float", metavar="NAME", nargs="+", default=[], help="layers that stay float, as --inspect names them, "
        "prefixes such as encoder.blocks.3, or paper: the encoder's last block and final layer norm (default: none)")
    _add_calibration(parser.add_argument_group("calibration"))
    _add_helpers(parser.add_argument_group("helpers"))
    group = parser.add_argument_group("layer by layer")
    group.add_argument("--sensitivity", action="store_true", help="print what each layer costs, alone in int8 and "
                       f"alone in float: KL to the float model's logits on the first {BATCH} windows, nats per token")
    group.add_argument("--auto-keep-float", type=as_number, metavar="BUDGET", help="keep so few layers in float that "
                       "this KL is at most BUDGET")
    add("--threads", type=as_whole, metavar="N",
        help="threads to compute with (default: the cores this process may use)")
    add("--quiet", action="store_true", help="no progress")
    return parser


def _add_calibration(group) -> None:
    default = CalibrationOptions()
    group.add_argument("--calibration", metavar="MANIFEST", help="recordings to calibrate on: tab-separated, with a "
                       "column path; transcripts are not needed")
    group.add_argument("--ranges", choices=METHODS, default=default.ranges, help="smallest and largest values; their "
                       "running mean over the batches; a percentile; or least squared error (default: minmax)")
    group.add_argument("--percentile", type=as_number, default=default.percentile, metavar="P", help="of the values "
                       f"below a range's upper end, in %%, for --ranges percentile (default: {default.percentile})")
    group.add_argument("--batches", type=as_whole, default=default.batches, metavar="N", help=f"of {BATCH} windows of "
                       f"at most 30 s; fewer recordings are used again (default: {default.batches})")
    group.add_argument("--seed", type=as_whole, default=default.seed, metavar="N", help="chooses recordings, and the "
                       f"rotation (default: {default.seed})")


def _add_helpers(group) -> None:
    group.add_argument("--smoothquant", type=as_number, metavar="ALPHA", help="move the largest values of layer norms' "
                       "outputs into the weights behind them: 0 not at all, 1 wholly (0.5 is usual; default: off)")
    group.add_argument("--bias-correction", action="store_true", help="take the mean error of rounded weights off the "
                       "biases (default: off)")
    group.add_argument("--equalize", action="store_true", help="even out the ranges between an attention's linears, "
                       "value and out, query and key (default: off)")
    group.add_argument("--rotate", action="store_true", help="rotate the residual streams, which spreads their "
                       "outliers (default: off)")
    group.add_argument("--error-feedback", action="store_true", help="round weights column by column, each making up "
                       "for the errors of those before it on what the layer hears, as GPTQ does (default: off)")
    group.add_argument("--error-diffusion", action="store_true", help="round attention's probabilities with what was "
                       "left of those before, so that many small ones do not vanish (w8a8-static only; default: off)")


def parse(argv: Sequence[str] | None) -> tuple[Namespace, QuantizeOptions, CalibrationOptions]:
    """Arguments -> where things are, and the options. UsageError names the flag."""
    args = build_parser().parse_args(argv)
    if args.inspect is not None:
        if args.model is not None or args.output is not None:
            raise UsageError("--inspect: expected neither MODEL nor --output beside it")
        return args, QuantizeOptions(), CalibrationOptions()
    options = _made(QuantizeOptions, args), _made(CalibrationOptions, args)
    _check(args, options[0])
    return args, *options


def _made(kind: type, args: Namespace):
    try:
        return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})
    except UsageError as error:
        raise name_flag(error) from None


def name_flag(error: UsageError) -> UsageError:
    """"keep_float: expected …" -> "--keep-float: expected …"."""
    name, _, rest = str(error).partition(":")
    known = {"threads"} | {field.name for kind in (QuantizeOptions, CalibrationOptions) for field in fields(kind)}
    return UsageError(f"{flag_of(name)}:{rest}") if name in known else error


def _check(args: Namespace, options: QuantizeOptions) -> None:
    """What must, or must not, be given together."""
    if args.model is None:
        raise UsageError("MODEL: expected a float model file, got none")
    if args.output is None and not args.sensitivity:
        raise UsageError("--output: expected a file to write, got none")
    if args.output is not None and args.output.suffix != ".safetensors":
        raise UsageError(f"--output: expected a name that ends in .safetensors, got {args.output}")
    if args.auto_keep_float is not None and not args.auto_keep_float >= 0:
        raise UsageError(f"--auto-keep-float: expected a number from 0 up, got {args.auto_keep_float}")
    looking = ("smoothquant", "bias_correction", "error_feedback", "sensitivity", "auto_keep_float")
    asked = [flag_of(name) for name in looking
             if getattr(args, name) is not None and getattr(args, name) is not False]  # fmt: skip
    if args.calibration is None and (options.needs_speech or asked):
        reason = asked[0] if asked else f"--scheme {options.scheme}"
        raise UsageError(f"--calibration: expected a manifest, which {reason} needs, got none")
