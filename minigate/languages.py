"""The languages that Whisper tells apart: code -> English name, names -> code.

The order is that of openai/whisper's tokenizer and decides the token ids: language i has the id `sot + 1 + i`.
Cantonese came with large-v3 (n_vocab 51866); older multilingual models know the 99 before it.
"""

import difflib

from minigate.errors import UsageError

# fmt: off
LANGUAGES = {
    "en": "english", "zh": "chinese", "de": "german", "es": "spanish", "ru": "russian", "ko": "korean",
    "fr": "french", "ja": "japanese", "pt": "portuguese", "tr": "turkish", "pl": "polish", "ca": "catalan",
    "nl": "dutch", "ar": "arabic", "sv": "swedish", "it": "italian", "id": "indonesian", "hi": "hindi",
    "fi": "finnish", "vi": "vietnamese", "he": "hebrew", "uk": "ukrainian", "el": "greek", "ms": "malay",
    "cs": "czech", "ro": "romanian", "da": "danish", "hu": "hungarian", "ta": "tamil", "no": "norwegian",
    "th": "thai", "ur": "urdu", "hr": "croatian", "bg": "bulgarian", "lt": "lithuanian", "la": "latin", "mi": "maori",
    "ml": "malayalam", "cy": "welsh", "sk": "slovak", "te": "telugu", "fa": "persian", "lv": "latvian",
    "bn": "bengali", "sr": "serbian", "az": "azerbaijani", "sl": "slovenian", "kn": "kannada", "et": "estonian",
    "mk": "macedonian", "br": "breton", "eu": "basque", "is": "icelandic", "hy": "armenian", "ne": "nepali",
    "mn": "mongolian", "bs": "bosnian", "kk": "kazakh", "sq": "albanian", "sw": "swahili", "gl": "galician",
    "mr": "marathi", "pa": "punjabi", "si": "sinhala", "km": "khmer", "sn": "shona", "yo": "yoruba", "so": "somali",
    "af": "afrikaans", "oc": "occitan", "ka": "georgian", "be": "belarusian", "tg": "tajik", "sd": "sindhi",
    "gu": "gujarati", "am": "amharic", "yi": "yiddish", "lo": "lao", "uz": "uzbek", "fo": "faroese",
    "ht": "haitian creole", "ps": "pashto", "tk": "turkmen", "nn": "nynorsk", "mt": "maltese", "sa": "sanskrit",
    "lb": "luxembourgish", "my": "myanmar", "bo": "tibetan", "tl": "tagalog", "mg": "malagasy", "as": "assamese",
    "tt": "tatar", "haw": "hawaiian", "ln": "lingala", "ha": "hausa", "ba": "bashkir", "jw": "javanese",
    "su": "sundanese", "yue": "cantonese",
}
ALIASES = {  # further names that openai/whisper accepts -> code
    "burmese": "my", "castilian": "es", "flemish": "nl", "haitian": "ht", "letzeburgesch": "lb", "mandarin": "zh",
    "moldavian": "ro", "moldovan": "ro", "panjabi": "pa", "pushto": "ps", "sinhalese": "si", "valencian": "ca",
}
# fmt: on
CODES = {name: code for code, name in LANGUAGES.items()} | ALIASES  # name or alias -> code


def language_code(language: str, codes: tuple[str, ...] = tuple(LANGUAGES)) -> str:
    """A code, a name or an alias, upper or lower case ("en", "English", "Mandarin") -> its code, one of `codes`.

    Raises UsageError for anything else; the message lists `codes` and names the nearest language.
    """
    wanted = language.strip().lower() if isinstance(language, str) else ""
    code = CODES.get(wanted, wanted)
    if code in codes:
        return code
    names = {name: code for name, code in CODES.items() if code in codes}
    nearest = difflib.get_close_matches(wanted, [*codes, *names], n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UsageError(f"language: expected one of {' '.join(codes)} or its English name, got {language!r}{hint}")
