"""A corpus that every machine has: the source of Python's own standard library and the documentation in it.

python corpus.py demo/corpus.jsonl        {"text": "\"\"\"Base classes for …", "source": "abc.py"} a line
"""

import argparse
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "pydoc_data"}


def documents() -> Iterator[tuple[str, str]]:
    """Yield (where it is from, text): every source file, and every topic of the language reference that pydoc has."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if SKIPPED_FOLDERS.isdisjoint(name.parts) and (text := read_text(path)):
            yield str(name), text
    try:
        from pydoc_data.topics import topics  # a trimmed Python may lack it
    except ImportError:
        return
    yield from ((f"pydoc: {topic}", text) for topic, text in sorted(topics.items()))


def read_text(path: Path) -> str | None:
    """Return a file's text, or None: some of the library's own tests are files that are no text on purpose."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if text.strip() and "\0" not in text else None


def main() -> None:
    """Write the corpus, in an order that is mixed but always the same: its end is held out for validation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    found = list(documents())
    random.Random(0).shuffle(found)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as file:
        for source, text in found:
            file.write(json.dumps({"text": text, "source": source}) + "\n")
    print(f"{output}: {len(found):,} documents, {output.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
