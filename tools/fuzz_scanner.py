"""Hold the C++ scanners against the `regex` package on random and adversarial strings.

    python tools/fuzz_scanner.py --strings 10000000 --seed 1

Strings are made of what patterns tell apart: every border between Unicode classes, contractions in any case, digits,
runs of spaces and line ends, and bytes that are not UTF-8. The first difference ends the run with exit code 1.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator

import numpy as np
import regex

from megascratch.tokenizer import PATTERNS, _bpe

CLASSES = {1: r"\p{L}", 2: r"\p{N}", 4: r"\s", 8: r"[\r\n]", 16: r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"}
CLASSES |= {32: r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"}

BITS = ["don't", "WE'LL", "it'ſ", "I'Ve", "''s", "'", "'r", "'l", "'LL", "'ſ", "x'S", "f'rE", "K", "ſ", "ǅ", "ʰ", "ª"]
BITS += ["1", "12", "1234567", "½", "٣", "ⅷ", " ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", "\r", "\x0b", "\x1c"]
BITS += ["\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u3000", "\u200b", "\ufeff", "/", "//", "!", "?!", "...", "_"]
BITS += [
    "a",
    "A",
    "aB",
    "HTTPServer",
    "camelCase",
    "\u0301",
    "e\u0301",
    "नी",
    "漢",
    "漢字",
    "가",
    "あ",
    "🙂",
    "é",
    "É",
    "ß",
]
BITS += ["a" * 15, "A" * 16, "b" * 17, "Ab" * 9, " " * 20, "\n" * 9, "9" * 10, "=" * 18, "ABCDEFGHIJKLMNOPq", "x" * 40]
BAD_BYTES = [b"\xff", b"\x80", b"\xc3", b"\xe4\xbd", b"\xf0\x9f\x99", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"]
BAD_BYTES += [b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xc3\x28", b"\xe4\xbd\x28"]


def classes_of_regex() -> np.ndarray:
    """Return the class bits of every code point as `regex` has them, uint8 [0x110000]; 0 for surrogates."""
    text = "".join(map(chr, range(0x110000)))
    bits = np.zeros(0x110000, np.uint8)
    for bit, pattern in CLASSES.items():
        for match in regex.finditer(f"(?:{pattern})+", text):
            bits[match.start() : match.end()] |= bit
    return bits


def disputed() -> np.ndarray:
    """Return the code points that `regex` and our table class differently: their Unicode versions do."""
    return np.flatnonzero(classes_of_regex() != np.frombuffer(_bpe.character_classes(), np.uint8))


def alphabet() -> list[str]:
    """Return the characters on both sides of each border between classes."""
    ours = np.frombuffer(_bpe.character_classes(), np.uint8)
    borders = np.flatnonzero(np.diff(ours))
    excluded = set(disputed().tolist()) | set(range(0xD800, 0xE000))
    return [chr(c) for c in sorted({*borders.tolist(), *(borders + 1).tolist()} - excluded)]


def strings(n: int, seed: int) -> Iterator[bytes]:
    """Yield random strings of 1 to 12 parts; every eighth may hold bytes that are not UTF-8."""
    rng = random.Random(seed)
    edges = [character.encode() for character in alphabet()]
    bits = [bit.encode() for bit in BITS]
    plain = [bytes([byte]) for byte in range(0x80)]
    for i in range(n):
        size = 1 + int(rng.random() * 12)
        parts = rng.choices(bits if i % 4 else plain, k=size)
        parts += rng.choices(edges, k=size // 2)
        if i % 8 == 7:
            parts += rng.choices(BAD_BYTES, k=2)
        rng.shuffle(parts)
        yield b"".join(parts)


def first_difference(n: int, seed: int) -> tuple[str, bytes] | None:
    """Cut n strings by scanner and by `regex`, the patterns in turn; return the first pattern and string to differ."""
    compiled = [(name, regex.compile(pattern)) for name, pattern in PATTERNS.items()]
    for i, data in enumerate(strings(n, seed)):
        name, pattern = compiled[i % len(compiled)]
        text = data.decode("utf-8", "surrogateescape")
        ends = _bpe.scan(name, data).tolist()
        pieces = [data[a:b].decode("utf-8", "surrogateescape") for a, b in zip([0, *ends], ends)]
        if pieces != pattern.findall(text, concurrent=False):
            return name, data
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--strings", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"our table: Unicode {_bpe.UNICODE_VERSION}; {len(disputed()):,} code points differ from `regex`, left out")
    begun = time.perf_counter()
    found = first_difference(args.strings, args.seed)
    print(f"{args.strings:,} strings in {time.perf_counter() - begun:.0f} s, seed {args.seed}: ", end="")
    print("no difference" if found is None else f"{found[0]} differs on {found[1]!r}")
    return found is not None


if __name__ == "__main__":
    sys.exit(main())
