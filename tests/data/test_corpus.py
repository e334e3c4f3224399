"""Reading: whole lines whatever the cuts, and what is refused before it exhausts the machine."""

import gzip
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO, FileIO
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megascratch.data.corpus import Limits, StretchReader, opened, whole_lines
from megascratch.data.indexed import IndexedDataset
from megascratch.data.preprocess import preprocess
from megascratch.errors import DataError


class Reader:
    """A stream that gives what it likes at each call, as decompressors do."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self.data, self.sizes = data, sizes

    def readinto(self, buffer: memoryview, /) -> int:
        self.sizes = [*self.sizes[1:], self.sizes[0]]
        size = min(self.sizes[0], len(buffer), len(self.data))
        buffer[:size], self.data = self.data[:size], self.data[size:]
        return size


LINES = st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=20).map(b"\n".join)


@settings(max_examples=100, deadline=None)
@given(data=LINES, size=st.integers(1, 40), sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_blocks_are_whole_lines_and_do_not_depend_on_the_reader(data, size, sizes):
    blocks = [bytes(block) for block in whole_lines(Reader(data, sizes), Path("a"), Limits(), size)]
    assert b"".join(blocks) == data
    assert all(block.endswith(b"\n") for block in blocks[:-1])
    assert blocks == [bytes(block) for block in whole_lines(BytesIO(data), Path("a"), Limits(), size)]
    read = set(range(size, len(data), size)) | {len(data)}  # a block ends with the last line of what is read by then
    ends = {data.rfind(b"\n", 0, end) + 1 for end in read} | {len(data)}
    assert set(accumulate(map(len, blocks))) == ends - {0}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("corpus") / "a.jsonl"


@settings(max_examples=100, deadline=None)
@given(data=LINES, size=st.integers(1, 40), block=st.integers(1, 40))
def test_every_line_belongs_to_one_stretch(file, data, size, block):
    file.write_bytes(data)
    with FileIO(file) as raw:
        sources = (StretchReader(raw, at, min(at + size, len(data))) for at in range(0, len(data), size))
        stretches = [b"".join(map(bytes, whole_lines(source, file, Limits(), block))) for source in sources]
    assert b"".join(stretches) == data
    assert all(one.endswith(b"\n") for one in stretches[:-1] if one and not data.endswith(one))


def zst(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(level=3).compress(data)


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".zst", zst)])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_an_endless_document(tmp_path, tokenizer, quiet, suffix, compress: Callable[[bytes], bytes], name):
    file = tmp_path / f"{name}{suffix}"
    file.write_bytes(compress(b"x" * (3 << 20)))
    with pytest.raises(DataError, match=r"is longer than 1,000 bytes .*raise --max-document-mb"):
        preprocess([file], tokenizer, tmp_path / "o", limits=Limits(max_document_bytes=1000), console=quiet)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zst)])
def test_a_file_that_expands_without_end(tmp_path, suffix, compress: Callable[[bytes], bytes]):
    file = tmp_path / f"bomb.jsonl{suffix}"
    file.write_bytes(compress(b'{"text": "a"}\n' * 6_000_000))
    with opened(file, Limits()) as stream, pytest.raises(DataError, match=r"expands more than 200-fold .* bomb"):
        for _ in whole_lines(stream, file, Limits()):
            pass
    with opened(file, Limits(max_expansion=100_000)) as stream:
        assert sum(map(len, whole_lines(stream, file, Limits()))) == 84_000_000


SMALL_MACHINE = """
import re, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[4]), int(sys.argv[4])))
from conftest import ByteTokenizer
from megascratch.data.preprocess import preprocess
from megascratch.errors import UserError
from megascratch.log import make_console
def peak_kib():  # not ru_maxrss of this process: it begins with what its parent had at the fork
    own = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
try:
    preprocess([sys.argv[1]], ByteTokenizer(), sys.argv[2], console=make_console(rank=1))
except UserError as error:
    print(peak_kib())
    sys.exit(str(error))
"""


@pytest.mark.parametrize("name", ["line.jsonl", "bomb.jsonl.zst", "bomb.jsonl.gz"])
def test_a_gigabyte_in_one_line_is_refused_within_one_gigabyte_of_memory(tmp_path, name):
    file = tmp_path / name
    if name == "line.jsonl":
        with file.open("wb") as sparse:
            sparse.write(b'{"text": "')
            sparse.truncate(1 << 30)
    elif name == "bomb.jsonl.zst":
        compressor = pytest.importorskip("zstandard").ZstdCompressor().compressobj()
        with file.open("wb") as bomb:
            bomb.writelines(compressor.compress(bytes(1 << 24)) for _ in range(64))
            bomb.write(compressor.flush())
    else:
        with gzip.open(file, "wb", compresslevel=1) as bomb:
            bomb.writelines([bytes(1 << 24)] * 16)
    arguments = [file, tmp_path / "o", Path(__file__).parent, 1 << 30]
    done = subprocess.run(
        [sys.executable, "-c", SMALL_MACHINE, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "is longer than 67,108,864 bytes" in done.stderr or "expands more than 200-fold" in done.stderr
    assert "Traceback" not in done.stderr
    assert int(done.stdout) < 1 << 20  # KiB


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Ten times the text, the same peak to within a tenth (and 8 MB for what the allocator keeps)."""
    peaks = []
    script = SMALL_MACHINE + "\nprint(peak_kib())"
    for number, n_lines in enumerate((20_000, 200_000)):
        file = tmp_path / f"{number}.jsonl"
        file.write_text('{"text": "' + "a" * 80 + '"}\n' * 1)
        file.write_bytes(file.read_bytes() * n_lines)
        arguments = [file, tmp_path / str(number), Path(__file__).parent, 8 << 30]
        command = [sys.executable, "-c", script, *map(str, arguments)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        assert len(IndexedDataset(tmp_path / f"{number}_text_document")) == n_lines
    assert peaks[1] < 1.1 * peaks[0] + (8 << 10)
