"""The byte alphabet of GPT-2: every byte as one printable character.

Byte-level BPE works on bytes, but `tokenizer.json` is text. So each byte is written as a character: those that print
stand for themselves, the other 68 become U+0100, U+0101, ... in order.

    b" the"  →  "Ġthe"        0x20 is the 33rd byte that does not print, and chr(256 + 32) is Ġ
    b"\\xc3\\xa9"  →  "Ã©"       the two bytes of é, each a printable Latin-1 character

Sorted by character, this alphabet is also the order of the first 256 ids (GPT-2 gives "!" the id 0), and the order in
which ties between pairs are broken in training.
"""

_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
_OTHER = tuple(byte for byte in range(256) if byte not in set(_PRINTABLE))

CHARACTER_OF_BYTE = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(_OTHER)}
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}
BYTES_IN_ID_ORDER = bytes(_PRINTABLE + _OTHER)


def to_characters(token: bytes) -> str:
    """Write bytes in the alphabet."""
    return "".join(map(CHARACTER_OF_BYTE.__getitem__, token))


def to_bytes(characters: str) -> bytes:
    """Read bytes back. Raises: KeyError: for a character outside the alphabet."""
    return bytes(map(BYTE_OF_CHARACTER.__getitem__, characters))
