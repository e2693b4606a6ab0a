#!/usr/bin/env python3
"""Make tests/golden/ from openai/whisper on torch (extra `reference`).  Run by hand, from the clone's root:

    pip install -e '.[reference]' && python tools/make_golden.py [NAME...]      (default: all)

`mel`        openai/whisper's filters, and columns of its log-mel of a synthetic signal and of weights/sample.wav
`tokenizer`  tiktoken's ids of the texts that tests/golden/tokenizer.json has, openai/whisper's special tokens
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
import tiktoken
import torch
from whisper.audio import N_SAMPLES, log_mel_spectrogram, mel_filters, pad_or_trim
from whisper.decoding import DecodingOptions, decode, detect_language
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_encoding, get_tokenizer
from whisper.transcribe import transcribe as whisper_transcribe
from whisper.version import __version__ as WHISPER

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minigate import checkpoint  # noqa: E402
from minigate.int8weights import dequantize  # noqa: E402
from tests import check  # noqa: E402

TOP = 16  # logits kept at every position
FRAMES = 50  # mel frames kept
POSITIONS = 12  # encoder positions kept, of every stage


def main(argv: list[str] | None = None) -> int:
    makers = {"mel": mel, "tokenizer": tokenizer, "embedded": embedded, "random80": lambda: random_model(80, 51865),
              "random128": lambda: random_model(128, 51866)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(makers))
    names = parser.parse_args(argv).names or list(makers)
    unknown = sorted(set(names) - set(makers))
    if unknown:
        parser.error(f"NAME: expected {' '.join(makers)}, got {' '.join(unknown)}")
    torch.set_num_threads(2)
    for name in names:
        with torch.no_grad():
            arrays, facts = makers[name]()
        write(check.GOLDEN / name, arrays, facts)
    return 0


def write(path: Path, arrays: dict, facts: dict) -> None:
    """PATH.npz and PATH.json, whichever has something in it."""
    files = []
    if arrays:
        files.append(path.with_suffix(".npz"))
        np.savez_compressed(files[-1], **arrays)
    if facts:
        files.append(path.with_suffix(".json"))
        facts["made_with"] = f"torch {torch.__version__}, tiktoken {tiktoken.__version__}, openai/whisper {WHISPER}"
        files[-1].write_text(dump(facts, 2) + "\n", encoding="utf-8")
    print(f"{path.name}: {sum(file.stat().st_size for file in files) / 1000:.0f} kB")


def dump(value, depth: int) -> str:
    """JSON with a line for each item of the outer `depth` levels, so that a change shows where it is."""
    if not depth or not isinstance(value, dict | list):
        return json.dumps(value, separators=(",", ":"))
    if isinstance(value, list):
        return "[\n" + ",\n".join(dump(item, depth - 1) for item in value) + "\n]"
    return "{\n" + ",\n".join(f"{json.dumps(key)}:{dump(item, depth - 1)}" for key, item in value.items()) + "\n}"


# --- sound and text

# Columns kept: the first (reflected start), some of the middle, the last of the content and those behind it.
SYNTHETIC_FRAMES = [0, 1, 2, 57, 113, 200, 249, 250, 251, 305, 310, 311]  # of 50001 // 160 = 312
SAMPLE_FRAMES = [0, 1, 2, 100, 444, 777, 1001, 1499, 1750, 1893, 1894, 1895, 1896, 1897, 2500]  # 1895 are content


def mel() -> tuple[dict, dict]:
    """What tests/test_mel.py compares with; frames and signal are as there."""
    arrays = {}
    for n_mels in (80, 128):
        arrays[f"filters_{n_mels}"] = mel_filters("cpu", n_mels).numpy()
        arrays[f"synthetic_{n_mels}"] = log_mel_spectrogram(synthetic(), n_mels).numpy()[:, SYNTHETIC_FRAMES]
        arrays[f"sample_{n_mels}"] = log_mel_spectrogram(sample(), n_mels, padding=N_SAMPLES).numpy()[:, SAMPLE_FRAMES]
    return arrays, {}


def synthetic() -> np.ndarray:
    """Two chirps (50001,), 100 to 7600 Hz with a beat and a weak, fast one, so that every band has its turn."""
    t = np.arange(50001) / check.SAMPLE_RATE
    loud = 0.4 * np.sin(2 * np.pi * (100 * t + 1200 * t * t)) * (1 + np.sin(2 * np.pi * 3 * t)) / 2
    return (loud + 0.01 * np.sin(2 * np.pi * 1100 * t * t)).astype(np.float32)


def sample() -> np.ndarray:
    """weights/sample.wav (n,)."""
    sound, rate = soundfile.read(check.SAMPLE, dtype="float32")
    if rate != check.SAMPLE_RATE or sound.ndim != 1:
        raise ValueError(f"{check.SAMPLE}: expected 16000 Hz mono, got {rate} Hz, shape {sound.shape}")
    return sound


def tokenizer() -> tuple[dict, dict]:
    """What tests/test_tokenizer.py compares with: the texts that are there already, encoded again."""
    texts = [case[0] for case in json.loads((check.GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))["cases"]]
    english, multilingual = get_encoding("gpt2"), get_encoding("multilingual")
    names = "eot sot translate transcribe sot_lm sot_prev no_speech no_timestamps timestamp_begin".split()
    specials = {}
    for n_vocab, is_multilingual, languages in ((51864, False, 99), (51865, True, 99), (51866, True, 100)):
        known = get_tokenizer(is_multilingual, num_languages=languages)
        codes = sorted(zip(known.all_language_tokens, known.all_language_codes, strict=True))  # theirs is a set's order
        specials[str(n_vocab)] = {name: getattr(known, name) for name in names} | {
            "all_language_codes": " ".join(code for _, code in codes),
            "non_speech_tokens": list(known.non_speech_tokens)}
    return {}, {"specials": specials, "columns": ["text", "English-only ids", "multilingual ids"],
                "cases": [[t, english.encode_ordinary(t), multilingual.encode_ordinary(t)] for t in texts]}


# --- the embedded model

def embedded() -> tuple[dict, dict]:
    """Every stage from sound to text, on the weights that the package carries."""
    file = checkpoint.read(check.EMBEDDED)
    metadata, tensors = dequantize(file.metadata, file.tensors)
    model = build(metadata["dims"], {n: t for n, t in tensors.items() if n != "tokenizer.vocabulary"})
    sound = sample()
    heard = log_mel_spectrogram(pad_or_trim(sound), metadata["dims"]["n_mels"])
    long = check.long_recording(sound)
    facts = {
        "tensors": check.tensor_digest(file.tensors),
        "decode": decode_all(model, heard, {
            "greedy": dict(language="en", without_timestamps=True),
            "timestamps": dict(language="en"),
            "beam5": dict(language="en", beam_size=5, without_timestamps=True),
        }),
        "transcribe": {
            "sample": transcribe(model, sound),
            "prompted": transcribe(model, sound, initial_prompt="Glossary: minigate, int8."),
            "long": transcribe(model, long),
            "long_no_condition": transcribe(model, long, condition_on_previous_text=False),
        },
    }
    tokens = [*start_tokens(model, without_timestamps=True), *facts["decode"]["greedy"]["tokens"]]
    return {**stages(model, heard), **teacher_forced(model, heard, tokens)}, facts


# --- random multilingual models

def random_model(n_mels: int, n_vocab: int) -> tuple[dict, dict]:
    """The multilingual paths, on a random model and a random log-mel."""
    dims = check.random_dims(n_mels, n_vocab)
    eot = get_tokenizer(multilingual=True).eot
    shapes = {name: tuple(t.shape) for name, t in Whisper(ModelDimensions(**dims)).state_dict().items()}
    model = build(dims, {name: check.random_tensor(name, shape, eot) for name, shape in shapes.items()})
    heard = torch.from_numpy(check.random_mel(n_mels))
    cases = {
        "greedy": dict(language="de", without_timestamps=True),
        "timestamps": dict(language="de"),
        "translate": dict(language="fr", task="translate"),
        "detected": dict(),
        "beam5": dict(language="ja", beam_size=5),
        "patience": dict(language="ja", beam_size=3, patience=2.0, length_penalty=0.6),
        "short": dict(language="ja", beam_size=4, patience=0.5, length_penalty=0.0),
        "prompt": dict(language="en", prompt=list(range(1000, 1300))),
        "unsuppressed": dict(language="en", suppress_tokens=""),
        "suppressed": dict(language="en", suppress_tokens="-1,4978,228"),
        "late": dict(language="en", max_initial_timestamp=None),
    }
    _, probabilities = detect_language(model, heard)
    facts = {"language": probabilities, "decode": decode_all(model, heard, cases)}
    tokens = [*start_tokens(model, language="de"), *facts["decode"]["timestamps"]["tokens"]]
    return {**stages(model, heard), **teacher_forced(model, heard, tokens)}, facts


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
            "last": logits[-1, ::check.LAST_STEP].numpy()}


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
    result = whisper_transcribe(model, sound, temperature=0.0, language="en", fp16=False, verbose=None, **options)
    return {"options": options, "text": result["text"], "segments": result["segments"]}


if __name__ == "__main__":
    sys.exit(main())
