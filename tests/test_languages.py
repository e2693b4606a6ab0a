"""Language names and codes."""

import pytest

from minigate.errors import UsageError
from minigate.languages import ALIASES, CODES, LANGUAGES, language_code


def test_table():
    assert len(LANGUAGES) == 100 and list(LANGUAGES)[-1] == "yue"
    assert len(CODES) == 112 and not set(ALIASES) & set(LANGUAGES.values())


@pytest.mark.parametrize(
    "language, code",
    [("en", "en"), ("English", "en"), (" DE ", "de"), ("haitian creole", "ht"), ("Castilian", "es"), ("yue", "yue")],
)
def test_code_name_or_alias(language, code):
    assert language_code(language) == code


@pytest.mark.parametrize(
    "language, message",
    [
        ("germn", "got 'germn'; did you mean german\\?"),
        ("englsh", "did you mean english\\?"),
        ("qqqqq", "expected one of en zh de .* yue or its English name, got 'qqqqq'$"),
        ("", "got ''$"),
        (None, "got None$"),
        (7, "got 7$"),
    ],
)
def test_anything_else_is_refused(language, message):
    with pytest.raises(UsageError, match=message) as caught:
        language_code(language)
    assert "\n" not in str(caught.value)


def test_only_the_codes_of_the_model_count():
    assert language_code("french", ("en", "fr")) == "fr"
    with pytest.raises(UsageError, match="language: expected one of en fr or its English name, got 'dutch'$"):
        language_code("dutch", ("en", "fr"))
