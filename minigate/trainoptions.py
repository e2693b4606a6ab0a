"""Every option of training: name, default, unit and range, for the command line and for a --config file.

What is computed lies in dataclasses (`TrainOptions` here, others beside what they are the options of), gathered in
`Settings`; where things are is left in argparse's namespace. A config file's lines become arguments in front of those
of the command line, which therefore win.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from minigate.attention import GATE_KINDS
from minigate.augment import AugmentOptions
from minigate.batches import AUDIO_CONTEXTS
from minigate.distill import OUTLIER_GROUPS, DistillOptions
from minigate.errors import FileError, UsageError
from minigate.labels import LabelOptions
from minigate.optim import OptimOptions
from minigate.options import ArgumentParser, Checks, as_number, as_number_or_none, as_numbers, as_whole, flag_of
from minigate.student import PARTS

PROG = "python -m minigate.train"
PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class TrainOptions:
    """The student and the loop. Raises UsageError for a value outside its range."""

    steps: int = 0  # of the optimizer
    gate: str = "none"
    gate_init: float = 0.5
    encoder_layers: int | None = None  # None: all of the teacher's
    decoder_layers: int | None = None
    freeze: Sequence[str] = ()  # parts that are not trained
    audio_context: str = "full"
    batch_seconds: float = 80.0
    accumulate: int = 1  # batches in a step
    precision: str = "float32"
    padded_share: float = 0.0  # variable context: of the windows, those that are heard as 30 s all the same
    seed: int = 0
    pack_seed: int | None = None  # of the data's packing and gains, which the teacher's labels hang on; None: seed
    checkpoint_every: int = 100
    eval_every: int = 500
    eval_utterances: int = 64
    eval_outliers: int = 8
    max_skipped: int = 10
    max_unreadable: float = 0.05

    def __post_init__(self):
        check = Checks(self)
        for name, low in (("steps", 0), ("seed", 0), ("accumulate", 1), ("checkpoint_every", 1), ("eval_every", 1),
                          ("eval_utterances", 1), ("eval_outliers", 1), ("max_skipped", 1)):  # fmt: skip
            check.whole(name, low)
        for name in ("encoder_layers", "decoder_layers"):
            check.whole(name, 1, optional=True)
        check.whole("pack_seed", 0, optional=True)
        check.number("batch_seconds", 0, above=True)
        check.number("padded_share", 0, 1)
        check.number("max_unreadable", 0, 1)
        check.choice("gate", GATE_KINDS)
        check.choice("audio_context", AUDIO_CONTEXTS)
        check.choice("precision", PRECISIONS)
        check.set("freeze", tuple(sorted(set(self.freeze))))


@dataclass(frozen=True)
class Settings:
    """All that decides what is computed."""

    train: TrainOptions = field(default_factory=TrainOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    label: LabelOptions = field(default_factory=LabelOptions)

    def values(self) -> dict:
        """Name -> value of all options."""
        return {name: value for part in vars(self).values() for name, value in vars(part).items()}

    def flat(self) -> dict:
        """The same as json.load gives it back: tuples are lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.values().items()}


# What a resumed run may have otherwise than before: it moves or ends the work, and decides how much is watched.
FREE = ("steps", "checkpoint_every", "eval_every", "eval_utterances", "eval_outliers", "max_skipped", "max_unreadable")


def check_same(facts: dict, settings: Settings, where: str) -> None:
    """UsageError, naming the flag, for an option that a resumed run must have as before. facts: of its checkpoint."""
    kept, now = {**Settings().flat(), **facts["options"]}, settings.flat()  # an option it lacks is younger than the run
    for name in now:
        if name not in FREE and kept[name] != now[name]:
            raise UsageError(f"{flag_of(name)}: expected {_shown(kept[name])} like the run in {where}, "
                             f"got {_shown(now[name])}; --resume continues a run with the options that it began with")
    if facts["step"] > settings.train.steps:
        raise UsageError(f"--steps: expected {facts['step']} at least, which the run in {where} has done, "
                         f"got {settings.train.steps}")  # fmt: skip


# --- the command line ---

STUDENT = (  # name, parser, what it stands for, help
    ("gate", str, "KIND", f"of every attention: {', '.join(GATE_KINDS)}"),
    ("gate_init", as_number, "P", "what every gate's sigmoid starts with; its output is divided by it"),
    ("encoder_layers", as_whole, "N", "evenly spaced ones of the teacher's, the first and the last among them"),
    ("decoder_layers", as_whole, "N", "likewise"),
    ("audio_context", str, "LENGTH", "full: the student hears windows of 30 s; variable: of the sound's length, "
                                     "rounded up to 1 s, at least 2 s"),
)  # fmt: skip
LOOP = (
    ("batch_seconds", as_number, "S", "of sound in a batch, as the student hears it; one window at least"),
    ("accumulate", as_whole, "N", "batches in a step"),
    ("precision", str, "TYPE", "of matrix products: float32 or bf16 (bfloat16, sums and weights in float32)"),
    ("padded_share", as_number, "P", "of an epoch's windows, those heard as 30 s all the same in variable context"),
    ("seed", as_whole, "N", "of the data's packing and order, of augmentation and of the gates' start"),
    ("pack_seed", as_whole, "N", "of the packing and the gains alone: runs that have it in common share their labels"),
    ("checkpoint_every", as_whole, "N", "steps from one checkpoint to the next"),
    ("eval_every", as_whole, "N", "steps from one look at the dev manifest to the next; the last step has one too"),
    ("eval_utterances", as_whole, "N", "of the dev manifest that are transcribed for the word error rate"),
    ("eval_outliers", as_whole, "N", "of these, those whose activations are measured"),
    ("max_skipped", as_whole, "N", "steps with a loss or gradient that is not finite, at which training gives up"),
)
OPTIM = (
    ("lr", as_number, "RATE", "highest learning rate"),
    ("gate_lr", as_number, "RATE", "the same, of the gates"),
    ("warmup", as_whole, "STEPS", "until the highest rate; then it falls linearly to 0"),
    ("weight_decay", as_number, "X", "a step takes rate * X of each matrix; other parameters have none"),
    ("beta1", as_number, "X", "AdamW's memory of gradients"),
    ("beta2", as_number, "X", "AdamW's memory of their squares"),
    ("eps", as_number, "X", "AdamW's least root of these"),
    ("clip_norm", as_number, "X", "longest gradient, all parameters together"),
    ("ema_decay", as_number, "X", "also write student-ema.safetensors, moving average of the weights with this decay, "
                                "0.999 for instance; 0: none"),
)  # fmt: skip
LOSSES = (
    ("kl_weight", as_number, "X", "of temperature² * KL(teacher ‖ student)"),
    ("ce_weight", as_number, "X", "of the cross-entropy on the teacher's text"),
    ("hidden_weight", as_number, "X", "of the mean squared difference of the encoders' outputs"),
    ("temperature", as_number, "T", "that divides the logits in the KL"),
    ("outlier_weight", as_number, "X", "of the mean over tensors of log(1 + E[(|activation| / (tau * unit))^power])"),
    ("outlier_tau", as_number, "X", "above this an activation counts much"),
    ("outlier_decoder_tau", as_number_or_none, "X", "the same in the decoder's blocks, whose values are smaller"),
    ("outlier_unit", str, "UNIT", "of tau: value, as it stands, or rms, multiples of each window's root mean square"),
    ("outlier_unit_most", as_number_or_none, "X", "largest root mean square that is taken as a unit"),
    ("outlier_power", as_number, "X", "above 1"),
    ("outlier_tensors", str, "GROUPS", f"comma-separated: {','.join(OUTLIER_GROUPS)}"),
)
DATA = (
    ("language", str, "CODE", "of the training data; auto: detected for each window"),
    ("timestamp_share", as_number, "P", "of the windows that are labelled with timestamps"),
    ("max_compression_ratio", as_number_or_none, "X", "labels that zlib shrinks more are not used; none: no check"),
    ("max_wer", as_number_or_none, "X", "labels with more word errors per word against the transcript, where there is "
                                      "one, are not used; none: no check"),
    ("max_unreadable", as_number, "P", "share of unreadable recordings above which a manifest is refused"),
    ("speeds", as_numbers, "X[,X…]", "every utterance once at each speed"),
    ("gain_db", as_number, "DB", "utterances are made louder or softer by up to this"),
    ("noise_share", as_number, "P", "of the student's windows that get noise"),
    ("noise_snr_db", as_numbers, "LOW,HIGH", "their signal-to-noise ratio in dB"),
    ("time_masks", as_whole, "N", "SpecAugment's, for each of the student's windows"),
    ("time_mask_s", as_number, "S", "longest of them"),
    ("freq_masks", as_whole, "N", "SpecAugment's"),
    ("freq_mask_bins", as_whole, "N", "widest of them, in mel bands"),
)  # fmt: skip
UNSET = {"outlier_unit_most": "none", "encoder_layers": "all", "decoder_layers": "all", "pack_seed": "that of --seed",
         "outlier_decoder_tau": "that of --outlier-tau"}  # what None stands for


def build_parser() -> ArgumentParser:
    """The command line of `python -m minigate.train`."""
    parser = ArgumentParser(prog=PROG, description="Distil a Whisper teacher into a student, whose attention "
                            "--gate gates. Progress goes to standard error, the files written to standard "
                            "output.")  # fmt: skip
    add = parser.add_argument
    add("--teacher", required=True, metavar="MODEL", help="float model file (python -m minigate.convert makes one)")
    add("--train", metavar="MANIFEST", type=Path, help="recordings to train on; needed unless --steps is 0")
    add("--dev", metavar="MANIFEST", type=Path, help="recordings to watch progress on; needed unless --steps is 0")
    add("--output", required=True, metavar="DIR", type=Path, help="where student, log and checkpoint go")
    add("--steps", required=True, type=as_whole, metavar="N", help="of training; 0 writes the untouched student")
    add("--resume", action="store_true", help="continue the run in --output from its checkpoint, or start if there is "
        "none; same options as before except --steps and how often to save and look")  # fmt: skip
    add("--config", metavar="FILE.toml", type=Path, help="more options, by the same names; the command line wins")
    add("--label-cache", metavar="DIR", type=Path, help="the teacher's labels and, with --hidden-weight, its "
        "encoder's outputs, 38 kB a second for tiny (default: DIR/labels of --output)")
    add("--mel-cache", metavar="DIR", type=Path, help="log-mels (default: DIR/mels of --output)")
    add("--threads", type=as_whole, metavar="N", help="default: the cores this process may use")
    add("--quiet", action="store_true", help="no progress")
    group = _add_group(parser, "student", STUDENT)
    group.add_argument("--freeze", nargs="+", default=[], metavar="PART",
                       help=f"not trained: {', '.join(PARTS)} (default: none)")  # fmt: skip
    for title, table in (("loop", LOOP), ("optimizer", OPTIM), ("losses", LOSSES), ("data", DATA)):
        _add_group(parser, title, table)
    return parser


def _add_group(parser: ArgumentParser, title: str, table: Sequence[tuple]) -> argparse._ArgumentGroup:
    group, defaults = parser.add_argument_group(title), Settings().values()
    for name, parse, metavar, text in table:
        shown = UNSET.get(name) or _shown(defaults[name])
        group.add_argument(flag_of(name), type=parse, default=defaults[name], metavar=metavar,
                           help=f"{text} (default: {shown})")  # fmt: skip
    return group


def _shown(value) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_shown, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Settings]:
    """Arguments -> where things are, and the settings. UsageError names the flag; FileError for a config file."""
    parser = build_parser()
    early = ArgumentParser(prog=PROG, add_help=False)
    early.add_argument("--config", type=Path)
    config = early.parse_known_args(argv)[0].config
    args = parser.parse_args([*(config_arguments(config, parser) if config else ()), *argv])
    if args.language.lower() == "auto":
        args.language = None
    parts, names = [], []
    for part in fields(Settings):
        kind = part.default_factory
        own = [f.name for f in fields(kind)]
        names += own
        try:
            parts.append(kind(**{name: getattr(args, name) for name in own}))
        except UsageError as error:
            raise name_flag(error, own) from None
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads: expected a whole number of at least 1, got {args.threads}")
    for name in ("train", "dev"):
        if args.steps and getattr(args, name) is None:
            raise UsageError(f"--{name}: expected a manifest, got none")
    return args, Settings(*parts)


def name_flag(error: UsageError, names: Sequence[str] | None = None) -> UsageError:
    """"gate_init: expected …" -> "--gate-init: expected …" where the first word is an option's name."""
    name, _, rest = str(error).partition(":")
    known = {"teacher", *Settings().values()} if names is None else names
    return UsageError(f"{flag_of(name)}:{rest}") if name in known else error


def config_arguments(path: Path, parser: ArgumentParser) -> list[str]:
    """A TOML file of `name = value` -> arguments; true is a flag that is given, a list its values. FileError."""
    known = {action.option_strings[-1]: action for action in parser._actions if action.option_strings}
    arguments = []
    for name, value in _read_toml(path).items():
        flag = flag_of(name)
        if flag not in known or flag in ("--config", "--help"):
            raise FileError(f"{path}: expected names of options, such as batch-seconds, got {name}")
        is_switch = known[flag].nargs == 0
        if isinstance(value, dict) or isinstance(value, bool) != is_switch:
            raise FileError(f"{path}: {name}: expected {'true or false' if is_switch else 'a value'}, got {value!r}")
        if is_switch:
            arguments += [flag] if value else []
        elif known[flag].nargs == "+":
            values = [str(item) for item in (value if isinstance(value, list) else [value])]
            arguments += [flag, *values] if values else []
        else:
            arguments.append(f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return arguments


def _read_toml(path: Path) -> dict:
    try:
        import tomllib  # Python 3.11
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError:
            raise FileError("--config: expected Python 3.11 or newer, or the package tomli, got neither") from None
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: expected a readable file, got {error.strerror or error}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise FileError(f"{path}: expected TOML, got {error}") from None
