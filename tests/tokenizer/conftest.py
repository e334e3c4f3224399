"""Text to train and encode: what every machine has, and what breaks tokenizers."""

import random
import sysconfig
import unicodedata
from pathlib import Path

import pytest

from megascratch.log import make_console
from megascratch.tokenizer import PATTERNS, Tokenizer, train_from_texts

_SCRIPTS = {  # first and last code point, with a separator that the script's text is written with
    "latin": (0x41, 0x24F, " "),
    "greek": (0x370, 0x3FF, " "),
    "cyrillic": (0x400, 0x4FF, " "),
    "hebrew": (0x5D0, 0x5EA, " "),
    "arabic": (0x620, 0x65F, " "),
    "devanagari": (0x900, 0x96F, " "),
    "thai": (0xE01, 0xE59, ""),
    "hangul": (0xAC00, 0xD7A3, " "),
    "kana": (0x3041, 0x30FF, ""),
    "han": (0x4E00, 0x9FA5, "。"),
    "mathematical": (0x1D400, 0x1D7FF, " "),
    "emoji": (0x1F300, 0x1F64F, "\u200d"),
    "symbols": (0x2000, 0x2BFF, ""),
}
_ADVERSARIAL = [
    "don't DON'T we'll WE'LL they'Ve I'm I'D it'S 'tis ''s 'sx x'ſ",
    "HTTPServerError camelCase XMLHttpRequest ǅungla ǅUNGLA iPhone15Pro",
    "1 12 123 1234 12345 1234567890 ½ ⅷ ٣٤٥ ४५६ 3.14e-10 0xDEADBEEF 1,000,000",
    " \t \n \r\n\r\n \x0b\x0c \x1c\x1d\x1e\x1f \x85 \xa0\u1680\u2003\u2028\u2029\u202f\u3000 end",
    "a  b   c    d\n\n\n    e\t\t\tf   \n  ",
    "!!!???... --- === *** ///\n//\r\n;;\n{}[]()<>@#$%^&*_+|~`\\",
    "e\u0301 n\u0303 a\u0308\u0323 \u0301alone क्षि นี้ \u200b\u200c\u200d\ufeff",
    "👨‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪🇫🇷 ☝️ 1️⃣ \U0010ffff \x00\x01\x7f",
    "<|endoftext|> <|fim_prefix|> <|end <s></s> [INST]",
    "a" * 500 + " " + "ab" * 300 + " " * 200 + "\n" * 100 + "=" * 333 + "A" * 200 + "é" * 200 + "漢" * 200,
]


def _words(rng: random.Random, first: int, last: int, separator: str) -> str:
    # Unassigned code points are left out: the Unicode versions of the oracles differ there.
    assigned = [chr(c) for c in range(first, last + 1) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    return separator.join("".join(rng.choices(assigned, k=rng.randint(1, 12))) for _ in range(400))


@pytest.fixture(scope="session")
def source_texts() -> list[str]:
    """About 2 MB of Python source."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-e]*.py"))
    return [path.read_text("utf-8", "replace") for path in paths][:60]


@pytest.fixture(scope="session")
def mixed_text(source_texts: list[str]) -> str:
    """1 MB or a little more of source, of every script, and of nasty strings."""
    rng = random.Random(0)
    parts = []
    size = 0
    while size < 1_000_000:
        source = rng.choice(source_texts)
        start = rng.randrange(max(1, len(source) - 20_000))
        parts += [source[start : start + 20_000], *rng.sample(_ADVERSARIAL, 4)]
        parts += [_words(rng, *script) for script in rng.sample(list(_SCRIPTS.values()), 2)]
        size = sum(len(part.encode()) for part in parts)
    return "\n".join(parts)


def _trained(texts: list[str], pattern: str) -> Tokenizer:
    return train_from_texts(texts, 3000, pattern, console=make_console(rank=1))


@pytest.fixture(scope="session")
def tokenizers_by_pattern(source_texts: list[str], mixed_text: str) -> dict[str, Tokenizer]:
    """A vocabulary of 3000 for each pattern, learnt from source and from other scripts."""
    texts = [*source_texts[:20], mixed_text[:300_000]]
    return {pattern: _trained(texts, pattern) for pattern in PATTERNS}


@pytest.fixture(scope="session")
def tokenizer(tokenizers_by_pattern: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers_by_pattern["cl100k"]
