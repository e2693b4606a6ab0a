"""The loop of training: steps, log, checkpoints, looks at the dev manifest, and how it ends.

    Trainer(…).restore(checkpoint) when a run is resumed
    Trainer.run() -> 0 after the last step, 128 + signal when it was interrupted

The state after a step is the student's weights, the optimizer's, the position in the data and two counters; what is
drawn at random follows from the seed and that position. So a resumed run takes the very steps of one that was never
stopped, on the same machine with the same instruction set and threads.
"""

import math
import signal
import time

import numpy as np

from minigate import devset, progress
from minigate.batches import Batch, Batches, Order
from minigate.devset import DevSet
from minigate.errors import FileError
from minigate.model import Dims, Model
from minigate.optim import AdamW, clip_scale, schedule
from minigate.parallel import Alone
from minigate.runfolder import Checkpoint, RunFolder
from minigate.step import Distillation, Losses, shares
from minigate.student import frozen_names
from minigate.tape import TOKEN_EMBEDDING, Recorded
from minigate.trainoptions import Settings


class Stop:
    """While entered, SIGINT and SIGTERM are noted in `signal` (0: none), for the loop to end after its step. A second
    one has its ordinary effect."""

    def __init__(self):
        self.signal = 0

    def __enter__(self) -> "Stop":
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Trainer:
    """A student under training, from step to step.

    metadata, tensors   the student's, as student.make_student gives them; tensors change while it learns
    batches, order      of the training data
    identity            what a checkpoint must have the same, beside the options: names of facts and their values
    """

    def __init__(self, settings: Settings, metadata: dict, tensors: dict, batches: Batches, order: Order,
                 dev: DevSet, folder: RunFolder, processes: Alone, identity: dict, quiet: bool = False):  # fmt: skip
        self.settings, self.metadata, self.batches, self.order = settings, metadata, batches, order
        self.dev, self.folder, self.processes, self.identity = dev, folder, processes, identity
        self.vocabulary = tensors["tokenizer.vocabulary"]
        self.ops = Recorded(metadata, tensors, bf16=settings.train.precision == "bf16")
        frozen = frozen_names(self.ops.p, settings.train.freeze)
        encoder = {name for name in self.ops.p if name.startswith("encoder.")}
        self.distillation = Distillation(
            self.ops, Dims(**metadata["dims"]), settings.distill, batches.labeller.teacher.ops.p[TOKEN_EMBEDDING],
            encoder_frozen=encoder <= frozen, processes=processes)  # fmt: skip
        self.optimizer = AdamW(self.ops.p, settings.optim, frozen)
        self.step = self.skipped = 0
        self.main = processes.rank == 0
        self.quiet = quiet or not self.main
        self.stop = Stop()

    # --- the state

    def checkpoint(self) -> Checkpoint:
        tensors = {f"student.{name}": p for name, p in self.ops.p.items()}
        tensors |= {f"optimizer.{name}": array for name, array in self.optimizer.state_dict().items()}
        return Checkpoint(tensors, {**self.identity, "step": self.step, "skipped": self.skipped,
                                    "order": self.order.state(), "options": self.settings.flat()})  # fmt: skip

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from there. FileError when it is not of this student or this data."""
        where, facts = self.folder.checkpoint, checkpoint.facts
        for name, value in self.identity.items():
            if facts.get(name) != value:
                raise FileError(f"{where}: {name}: expected {value}, got {facts.get(name)}")
        student = checkpoint.part("student.")
        for name in sorted(self.ops.p.keys() | student.keys()):
            expected, got = (tensors[name].shape if name in tensors else None for tensors in (self.ops.p, student))
            if expected != got:
                raise FileError(f"{where}: tensor {name}: expected shape {expected}, got {got}")
        self.optimizer.load_state(checkpoint.part("optimizer."))
        self.order.restore(facts["order"])
        for name, p in self.ops.p.items():
            p[...] = student[name]
        self.step, self.skipped = facts["step"], facts["skipped"]

    def student(self, average: bool = False) -> dict[str, np.ndarray]:
        """The student's tensors, those of the moving average when told."""
        params = self.optimizer.averaged(self.ops.p) if average else self.ops.p
        return {**params, "tokenizer.vocabulary": self.vocabulary}

    # --- the loop

    def label(self) -> None:
        """Have the teacher label what the steps to come and the dev set need and the cache has not; processes share
        the work."""
        windows = self.order.upcoming((self.settings.train.steps - self.step) * self.settings.train.accumulate)
        own = windows[self.processes.rank :: self.processes.ranks]
        self.batches.labeller.ensure(own, shown=not self.quiet)
        self.dev.label(shown=not self.quiet)
        self.processes.wait()

    def run(self) -> int:
        """-> 0 when all steps are taken, 128 + signal when SIGINT or SIGTERM came; the checkpoint is written in both
        cases. FileError for a full disk or too many skipped steps: the last good checkpoint stays."""
        options = self.settings.train
        with self.stop, progress.bar(options.steps, "training", "step", self.step, not self.quiet) as bar:
            while self.step < options.steps:
                line = self.train_step()
                show(bar, line)
                if "skipped" in line:
                    self._say(f"step {self.step}: loss or gradient not finite, skipped ({self.skipped} so far)")
                if self.step % options.eval_every == 0 or self.step == options.steps:
                    line |= self._look()
                stopped = self.processes.largest(self.stop.signal)
                if self.main:
                    self.folder.log(line)
                if self.skipped >= options.max_skipped:
                    raise FileError(f"training: {self.skipped} steps had a loss or gradient that is not finite, the "
                                    f"last one {self.step}; a lower --lr or another --precision may help")  # fmt: skip
                if self.main and (stopped or self.step % options.checkpoint_every == 0 or self.step == options.steps):
                    self.folder.save(self.checkpoint())
                if stopped:
                    return 128 + stopped
        return 0

    def train_step(self) -> dict:
        """One step -> its line of the log. A loss or gradient that is not finite changes nothing but is counted."""
        start = time.perf_counter()
        batches, epoch = self._draw()
        self.ops.grads.clear()
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # shows in loss and norm
            losses, seconds = self._forward_backward(batches)
            self.processes.total_gradients(self.ops.grads, self.optimizer.params)
            norm = self.optimizer.norm(self.ops.grads)
        optim, loss = self.settings.optim, losses.loss(self.settings.distill)
        self.step += 1
        factor = schedule(self.step, self.settings.train.steps, optim.warmup)
        line = {"step": self.step, "loss": loss, **vars(losses), "norm": norm, "lr": optim.lr * factor,
                "gate_lr": optim.gate_lr * factor, "epoch": epoch, "seconds": round(seconds, 3)}  # fmt: skip
        if math.isfinite(loss) and math.isfinite(norm):
            scale = clip_scale(norm, optim.clip_norm)
            self.optimizer.step(self.ops.grads, optim.lr * factor, optim.gate_lr * factor, scale)
        else:
            self.skipped += 1
            line["skipped"] = self.skipped
        line["elapsed_s"] = round(time.perf_counter() - start, 4)
        return line

    def _draw(self) -> tuple[list[Batch | None], int]:
        """-> this process's shares of a step's batches, and the epoch of the last. FileError when no label is used."""
        for _ in range(len(self.order.windows) + 1):
            draws = [self.order.next() for _ in range(self.settings.train.accumulate)]
            batches = [self.batches.load(draw, self.processes.rank, self.processes.ranks) for draw in draws]
            if self.processes.largest(max(batch is not None for batch in batches)):
                return batches, draws[-1].epoch
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.batches.labeller.left_out.items())
        raise FileError(f"training data: expected a window whose label is used, got none (left out: {reasons})")

    def _forward_backward(self, batches: list[Batch | None]) -> tuple[Losses, float]:
        """-> the losses and the seconds of sound, of all processes; gradients of this one in ops.grads."""
        sums = np.zeros(5)
        for batch, share in zip(batches, shares(batches, self.processes), strict=True):
            losses = self.distillation.forward_backward(batch, share)
            sums += [*losses.array(), batch.seconds if batch else 0.0]
        *losses, seconds = (float(v) for v in self.processes.total(sums))
        return Losses(*losses), seconds

    def _look(self) -> dict:
        """-> {"dev": figures}, or nothing when it was stopped in the middle."""
        student = Model(self.metadata, self.student())
        figures = self.dev.figures(self.distillation, student, lambda: bool(self.stop.signal))
        if figures is None:
            return {}
        self._say(f"step {self.step}: {devset.describe(figures)}")
        return {"dev": figures}

    def _say(self, text: str) -> None:
        if not self.quiet:
            progress.say(text)


def show(bar, line: dict) -> None:
    """A step's line of the log, on the bar."""
    parts = [f"{name} {line[name]:.4g}" for name in ("loss", "kl", "ce", "hidden", "outlier", "norm", "lr")
             if line[name] or name == "loss"]  # fmt: skip
    parts.append(f"{line['seconds'] / line['elapsed_s']:.1f} s/s")
    bar.set_postfix_str(", ".join(parts), refresh=False)
    bar.update()
