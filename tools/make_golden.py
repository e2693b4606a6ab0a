#!/usr/bin/env python3
"""Make tests/golden/ from openai/whisper on torch (extra `reference`).  Run by hand, from the clone's root:

    pip install -e '.[reference]' && python tools/make_golden.py [NAME...]      NAME: embedded random80 random128

`embedded`   openai/whisper with the embedded model's dequantized weights on weights/sample.wav: samples of every
             stage, logits, tokens of every way of decoding, long-form results
`random80`, `random128`   small random multilingual models (tests/check.py makes the weights from their names):
             language detection, timestamp rules, translation, beams with patience, prompts

What is written is the same every time but for torch's last digits.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
import whisper
from whisper.audio import log_mel_spectrogram, pad_or_trim
from whisper.decoding import DecodingOptions, decode, detect_language
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minigate import checkpoint  # noqa: E402
from minigate.quantize import dequantize  # noqa: E402
from tests import check  # noqa: E402

TOP = 16  # logits kept at every position
FRAMES = 50  # mel frames kept
POSITIONS = 12  # encoder positions kept, of every stage
LAST_STEP = 64  # of the last position's logits every 64th is kept


def main(argv: list[str] | None = None) -> int:
    makers = {"embedded": embedded, "random80": lambda: random_model(80, 51865),
              "random128": lambda: random_model(128, 51866)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *makers], help="which to make (default: all)")
    names = parser.parse_args(argv).names or list(makers)
    torch.set_num_threads(2)
    for name in names:
        with torch.no_grad():
            arrays, facts = makers[name]()
        facts["versions"] = {"torch": torch.__version__, "openai-whisper": whisper.__version__}
        write(name, arrays, facts)
    return 0


def write(name: str, arrays: dict, facts: dict) -> None:
    np.savez_compressed(check.GOLDEN / f"{name}.npz", **arrays)
    text = json.dumps(facts, ensure_ascii=False, indent=None, separators=(",", ":"), sort_keys=True)
    (check.GOLDEN / f"{name}.json").write_text(text.replace("},{", "},\n{") + "\n", encoding="utf-8")
    size = sum((check.GOLDEN / f"{name}{end}").stat().st_size for end in (".npz", ".json"))
    print(f"{name}: {size / 1000:.0f} kB")


# --- the embedded model

def embedded() -> tuple[dict, dict]:
    """Every stage from sound to text, on the weights that the package carries."""
    file = checkpoint.read(check.EMBEDDED)
    metadata, tensors = dequantize(file.metadata, file.tensors)
    model = build(metadata["dims"], {n: t for n, t in tensors.items() if n != "tokenizer.vocabulary"})
    sound, rate = soundfile.read(check.SAMPLE, dtype="float32")
    if rate != check.SAMPLE_RATE or sound.ndim != 1:
        raise ValueError(f"{check.SAMPLE}: expected 16000 Hz mono, got {rate} Hz, shape {sound.shape}")
    mel = log_mel_spectrogram(pad_or_trim(sound), metadata["dims"]["n_mels"])
    long = check.long_recording(sound)
    facts = {
        "model_sha256_of_tensors": digest(file.tensors),
        "decode": decode_all(model, mel, {
            "greedy": dict(without_timestamps=True),
            "timestamps": dict(),
            "beam5": dict(without_timestamps=True, beam_size=5),
            "beam5_timestamps": dict(beam_size=5),
            "prompt": dict(prompt=" Glossary: minigate, int8."),
        }),
        "transcribe": {
            "sample": transcribe(model, sound),
            "prompted": transcribe(model, sound, initial_prompt="Glossary: minigate, int8."),
            "long": transcribe(model, long),
            "long_no_condition": transcribe(model, long, condition_on_previous_text=False),
        },
    }
    tokens = [*start_tokens(model, without_timestamps=True), *facts["decode"]["greedy"]["tokens"]]
    return {**stages(model, mel), **teacher_forced(model, mel, tokens)}, facts


def digest(tensors) -> str:
    """Names the weights that a golden file was made with, so that another embedded model is noticed."""
    import hashlib

    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return sha.hexdigest()


# --- random multilingual models

def random_model(n_mels: int, n_vocab: int) -> tuple[dict, dict]:
    """The multilingual paths, on a random model and a random log-mel."""
    dims = check.random_dims(n_mels, n_vocab)
    eot = get_tokenizer(multilingual=True).eot
    shapes = {name: tuple(t.shape) for name, t in Whisper(ModelDimensions(**dims)).state_dict().items()}
    model = build(dims, {name: check.random_tensor(name, shape, eot) for name, shape in shapes.items()})
    mel = torch.from_numpy(check.random_mel(n_mels))
    plain = dict(suppress_tokens="")
    cases = {
        "greedy": dict(language="de", without_timestamps=True),
        "timestamps": dict(language="de"),
        "translate": dict(language="fr", task="translate"),
        "detected": dict(),
        "beam5": dict(language="ja", beam_size=5),
        "patience": dict(language="ja", beam_size=3, patience=2.0, length_penalty=0.6),
        "short": dict(language="ja", beam_size=4, patience=0.5, length_penalty=0.0),
        "prompt": dict(language="en", prompt=list(range(1000, 1300))),
        "suppressed": dict(language="en", suppress_tokens="11,13,50300"),
        "late": dict(language="en", max_initial_timestamp=None),
    }
    _, probabilities = detect_language(model, mel)
    facts = {"language": probabilities, "decode": decode_all(model, mel, {n: {**plain, **c} for n, c in cases.items()})}
    tokens = [*start_tokens(model, language="de"), *facts["decode"]["timestamps"]["tokens"]]
    return {**stages(model, mel), **teacher_forced(model, mel, tokens)}, facts


# --- what is taken from a model

def build(dims: dict, tensors: dict[str, np.ndarray]) -> Whisper:
    model = Whisper(ModelDimensions(**dims)).eval()
    model.load_state_dict({name: torch.from_numpy(np.array(t, np.float32)) for name, t in tensors.items()})
    return model


def start_tokens(model: Whisper, language: str = "en", without_timestamps: bool = False) -> list[int]:
    tokenizer = get_tokenizer(model.is_multilingual, num_languages=model.num_languages, language=language)
    return list(tokenizer.sot_sequence_including_notimestamps if without_timestamps else tokenizer.sot_sequence)


def stages(model: Whisper, mel: torch.Tensor) -> dict[str, np.ndarray]:
    """mel (n_mels, 3000) -> samples of the mel, the stem, every block and the encoder's output."""
    seen = {}
    hooks = [model.encoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(conv=args[0]))]
    for i, block in enumerate(model.encoder.blocks):
        hooks.append(block.register_forward_hook(lambda _, args, out, name=f"block{i}": seen.update({name: out})))
    seen["encoder"] = model.encoder(mel[None])
    for hook in hooks:
        hook.remove()
    frames = spread(mel.shape[1], FRAMES)
    positions = spread(model.dims.n_audio_ctx, POSITIONS)
    samples = {name: x[0, positions].numpy() for name, x in seen.items()}
    return {"frames": frames, "positions": positions, "mel": mel[:, frames].numpy(),
            "mel_mean": mel.mean(dim=1).numpy(), **samples}


def spread(n: int, count: int) -> np.ndarray:
    """count indices from 0 to n - 1, both included."""
    return np.linspace(0, n - 1, count).round().astype(np.int32)


def teacher_forced(model: Whisper, mel: torch.Tensor, tokens: list[int]) -> dict[str, np.ndarray]:
    """The largest logits at every position, and a sample of the last position's."""
    logits = model(mel[None], torch.tensor([tokens]))[0]
    top, ids = logits.topk(TOP)
    return {"tokens": np.array(tokens, np.int32), "top": top.numpy(), "top_ids": ids.numpy().astype(np.int32),
            "last": logits[-1, ::LAST_STEP].numpy()}


def decode_all(model: Whisper, mel: torch.Tensor, cases: dict[str, dict]) -> dict[str, dict]:
    """Name -> options -> the options and what one window decodes to."""
    found = {}
    for name, options in cases.items():
        result = decode(model, mel, DecodingOptions(fp16=False, **options))
        found[name] = {"options": options, "language": result.language, "tokens": result.tokens, "text": result.text,
                       "avg_logprob": result.avg_logprob, "no_speech_prob": result.no_speech_prob}
    return found


def transcribe(model: Whisper, sound: np.ndarray, **options) -> dict:
    """The long-form result at temperature 0, with the options that gave it."""
    result = whisper.transcribe(model, sound, temperature=0.0, language="en", fp16=False, verbose=None, **options)
    return {"options": options, "text": result["text"], "segments": result["segments"]}


if __name__ == "__main__":
    sys.exit(main())
