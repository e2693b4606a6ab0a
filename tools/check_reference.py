#!/usr/bin/env python3
"""Hold a float model against reference vectors that openai/whisper made: every bar with its measured value.

usage: python tools/check_reference.py FOLDER MODEL.safetensors AUDIO LONG_AUDIO

FOLDER holds NAME.npz and NAME.json, NAME being the model file's name without extension.  From AUDIO, padded with
silence to 30 s: npz `mel` (n_mels, 3000), `encoder` (T, D), `tokens` with `logits_top` and `logits_top_ids` at every
position and `logits_last`, if multilingual `language_top`; json `greedy`, `greedy_timestamps`, `beam5`.  Of whole
recordings: json `transcribe` (AUDIO), `long` and `long_no_condition` (LONG_AUDIO).  Exit code 1 when a bar is missed.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minigate.audio import read_audio  # noqa: E402
from minigate.decoding import decode, detect_language  # noqa: E402
from minigate.errors import FileError  # noqa: E402
from minigate.mel import N_SAMPLES, log_mel  # noqa: E402
from minigate.model import load  # noqa: E402
from minigate.options import DecodingOptions  # noqa: E402
from tests import check  # noqa: E402
from tests.check import Bar  # noqa: E402

ONE_WINDOW = {"greedy": dict(without_timestamps=True), "greedy_timestamps": dict(),
              "beam5": dict(without_timestamps=True, beam_size=5)}
LONG_FORM = {"transcribe": {}, "long": {}, "long_no_condition": dict(condition_on_previous_text=False)}


def one_window(model, sound: np.ndarray, arrays: dict, facts: dict) -> Iterator[Bar]:
    """Sound of at most 30 s -> bars from mel to tokens."""
    mel = log_mel(sound, model.dims.n_mels, padding=N_SAMPLES - len(sound))
    yield check.largest_bar("mel", mel, arrays["mel"], check.MEL)
    xa = model.encode(mel[None])
    yield check.relative_bar("encoder", xa[0], arrays["encoder"])
    logits = model.decode(arrays["tokens"][None], model.start(xa), all_positions=True)[0]
    yield from check.logit_bars("teacher-forced", logits, arrays["logits_top_ids"], arrays["logits_top"])
    yield check.largest_bar("last position, all logits", logits[-1], arrays["logits_last"], check.LOGIT)
    if "language_top" in arrays:
        [found] = detect_language(model, xa)
        codes, expected = arrays["language_top"].T
        yield check.largest_bar("language", [found[code] for code in codes], expected.astype(float), check.PROBABILITY)
    for name, options in ONE_WINDOW.items():
        [result] = decode(model, xa, DecodingOptions(language="en", **options))
        yield check.token_bar(name, result.tokens, facts[name]["tokens"])
        if "avg_logprob" in facts[name]:
            expected = facts[name]["avg_logprob"]
            yield check.largest_bar(f"{name}, avg_logprob", result.avg_logprob, expected, check.PROBABILITY)


def long_form(model, files: dict[str, str], facts: dict) -> Iterator[Bar]:
    """Whole recordings at temperature 0 -> bars."""
    for name, options in LONG_FORM.items():
        result = model.transcribe(files[name], language="en", temperature=0.0, **options)
        yield from check.result_bars(name, result.to_dict(), facts[name])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("FOLDER", "MODEL", "AUDIO", "LONG_AUDIO"):
        parser.add_argument(name.lower(), metavar=name)
    args = parser.parse_args(argv)
    start, missed = time.perf_counter(), 0
    try:
        model = load(args.model)
        arrays, facts = check.read_golden(Path(args.folder) / Path(args.model).stem)
        files = {"transcribe": args.audio, "long": args.long_audio, "long_no_condition": args.long_audio}
        for stage in (one_window(model, read_audio(args.audio), arrays, facts), long_form(model, files, facts)):
            for bar in stage:
                print(bar, flush=True)
                missed += not bar.ok
    except (FileError, OSError, json.JSONDecodeError) as error:
        print(f"check_reference: {error}", file=sys.stderr)
        return 1
    print(f"{Path(args.model).stem}: {missed} missed, {time.perf_counter() - start:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
