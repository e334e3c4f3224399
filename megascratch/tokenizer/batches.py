"""Short texts put together, so that each call into C++ has enough work for its threads."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

Text = TypeVar("Text", str, bytes)


def in_batches(texts: Iterable[Text], size: int) -> Iterator[list[Text]]:
    """Yield texts in order, in lists that end as soon as they hold `size` characters (of str) or bytes (of bytes)."""
    batch: list[Text] = []
    length = 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length >= size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch
