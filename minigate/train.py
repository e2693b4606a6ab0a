"""`python -m minigate.train`: a Whisper teacher and recordings -> a student, whose attention --gate gates.

    teacher --make_student--> student --Trainer, on the teacher's labels--> DIR/student.safetensors

The files written are named on standard output, everything else goes to standard error. Exit codes: 0 done, 1 a file or
the training failed, 2 wrong usage, 130 Ctrl-C and 143 SIGTERM, after the checkpoint was saved.
"""

import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minigate import __version__, checkpoint, kernels, parallel
from minigate.batches import Batches, Order
from minigate.command import FAILED, run_main, say
from minigate.data import Recordings, Window, make_windows
from minigate.devset import DevSet
from minigate.errors import FileError, UsageError
from minigate.labels import LabelCache, Labeller, sha256_file
from minigate.manifest import read_manifest
from minigate.melcache import MelCache
from minigate.model import Model, find
from minigate.parallel import Alone
from minigate.runfolder import RunFolder
from minigate.student import make_student
from minigate.trainer import Trainer
from minigate.trainoptions import PROG, Settings, check_same, name_flag, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Arguments (default: the command line's) -> exit code."""
    processes, ended = Alone(), False

    def work() -> int:
        nonlocal processes, ended
        args, settings = parse(sys.argv[1:] if argv is None else argv)
        processes = parallel.connect()
        try:
            code = run(args, settings, processes)
        except UsageError as error:
            raise name_flag(error) from None
        except Exception as error:
            if processes.ranks == 1 or isinstance(error, FileError):
                raise
            traceback.print_exc()  # and on, or the other processes would wait for this one
            return FAILED
        ended = True
        return code

    code = run_main(PROG, work)
    if not ended:
        processes.abort(code)
    return code


def run(args: Namespace, settings: Settings, processes: Alone) -> int:
    """Parsed arguments -> exit code. Raises UsageError and FileError."""
    kernels.set_threads(args.threads or parallel.fair_threads(processes))
    folder, path = RunFolder(args.output), find(args.teacher)
    teacher = checkpoint.read(path)
    metadata, tensors = untrained(teacher, settings)
    if processes.rank == 0:
        folder.prepare(args.resume)
    processes.wait()
    kept = folder.load() if args.resume else None
    if kept:
        check_same(kept.facts, settings, str(folder.checkpoint))
    if not settings.train.steps:
        return write_students(folder, settings, metadata, {folder.student: tensors}, processes)
    trainer = make_trainer(args, settings, teacher, (metadata, tensors), folder, processes)
    if kept:
        trainer.restore(kept)
    del tensors, kept  # the trainer has its own
    code = train(trainer)
    if code and processes.rank == 0:
        say(PROG, f"after step {trainer.step}, saved; --resume continues", "interrupted")
    if code:
        return code
    results = {folder.student: trainer.student()}
    if settings.optim.ema_decay:
        results[folder.student_ema] = trainer.student(average=True)
    return write_students(folder, settings, metadata, results, processes, command_line(args, settings))


def untrained(teacher: checkpoint.ModelFile, settings: Settings) -> tuple[dict, dict]:
    """-> metadata and tensors of the student before its first step; without any step it hears the full context."""
    t = settings.train
    context = t.audio_context if t.steps else "full"
    return make_student(teacher.metadata, teacher.tensors, t.encoder_layers, t.decoder_layers, t.gate, t.gate_init,
                        t.seed, context)  # fmt: skip


def make_trainer(args: Namespace, settings: Settings, teacher_file: checkpoint.ModelFile, student: tuple[dict, dict],
                 folder: RunFolder, processes: Alone) -> Trainer:  # fmt: skip
    """Manifests, caches and options -> a trainer at step 0."""
    t, teacher_hash = settings.train, sha256_file(teacher_file.path)
    teacher = Model(teacher_file.metadata, teacher_file.tensors, name=teacher_file.path.stem)
    cache = LabelCache(args.label_cache or args.output / "labels", teacher_hash, settings.label.language)
    quiet, pack_seed = processes.rank != 0, t.seed if t.pack_seed is None else t.pack_seed

    def prepare(manifest: Path, mode: str, augment, label_options) -> tuple[Batches, list[Window]]:
        recordings = Recordings(str(manifest), cache.folder / "recordings.jsonl", t.max_unreadable, *[_silent] * quiet)
        windows = make_windows(recordings.measure(read_manifest(manifest)), mode, pack_seed, augment)
        mels = MelCache(recordings, teacher.dims.n_mels, args.mel_cache or args.output / "mels")
        encoding_for = t.audio_context if settings.distill.hidden_weight else None
        labeller = Labeller(teacher, cache, mels, label_options, encoding_for=encoding_for)
        return Batches(labeller, t.audio_context, augment, t.seed), windows

    batches, windows = prepare(args.train, t.audio_context, settings.augment, settings.label)
    dev_batches, dev_windows = prepare(args.dev, "single", None, replace(settings.label, max_wer=None))
    dev = DevSet(dev_batches, dev_windows, t.batch_seconds, t.eval_utterances, t.eval_outliers, processes)
    order = Order(windows, t.audio_context, t.batch_seconds, t.seed, t.padded_share)
    identity = {"teacher_sha256": teacher_hash}
    return Trainer(settings, *student, batches, order, dev, folder, processes, identity, args.quiet)


def train(trainer: Trainer) -> int:
    """Labels, log and loop -> the loop's exit code."""
    trainer.label()
    try:
        if trainer.main:
            trainer.folder.open_log(trainer.step)
        return trainer.run()
    finally:
        trainer.folder.close()


def write_students(folder: RunFolder, settings: Settings, metadata: dict, results: dict, processes: Alone,
                   command: str = "") -> int:  # fmt: skip
    """Write model files, path -> tensors, and name them -> 0."""
    training = {"command": command, "minigate": __version__, **settings.flat()} if command else None
    provenance = {**metadata["provenance"], "training": training}
    for path, tensors in results.items():
        if processes.rank == 0:
            checkpoint.write(path, {**metadata, "provenance": provenance}, tensors)
            print(f"{path}: {metadata['name']}, {settings.train.steps} steps, {path.stat().st_size / 1e6:.1f} MB")
    return 0


def command_line(args: Namespace, settings: Settings) -> str:
    """The command that makes this student, for its metadata: names of files without folders, options that differ."""
    defaults, parts = Settings().flat(), [PROG, "--teacher", Path(args.teacher).name]
    parts += ["--train", args.train.name, "--dev", args.dev.name]
    for name, value in settings.flat().items():
        if value != defaults[name]:
            values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
            parts += [f"--{name.replace('_', '-')}", *(values if name == "freeze" else [",".join(values)])]
    return " ".join(parts)


def _silent(line: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
