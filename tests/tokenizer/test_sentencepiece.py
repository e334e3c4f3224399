"""SentencePiece's BPE with byte fallback, against `sentencepiece` and `tokenizers`."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megascratch.errors import TokenizerError
from megascratch.tokenizer import StreamDecoder, Tokenizer
from megascratch.tokenizer.formats import open_tokenizer, write
from megascratch.tokenizer.hugging_face import parse, render
from megascratch.tokenizer.sentencepiece import read

# As the published models were trained: Llama 2 and Mistral put a space in front, Gemma does not and keeps runs of white
# space whole; the last has every switch of the format that we run the other way round.
SHAPES: dict[str, dict[str, Any]] = {
    "llama2": {"remove_extra_whitespaces": False, "split_digits": True},
    "gemma": {
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "split_digits": True,
        "user_defined_symbols": ["<table>", "\n", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "\t\t", "ab▁cd"],
        "bos_id": 2,
        "eos_id": 1,
        "pad_id": 0,
        "unk_id": 3,
        "bos_piece": "<bos>",
        "eos_piece": "<eos>",
    },
    "defaults": {"control_symbols": ["[INST]", "[/INST]"], "user_defined_symbols": ["<sep>"]},
    "across words": {"remove_extra_whitespaces": False, "split_by_whitespace": False},
}
NASTY = [
    "",
    " ",
    "   ",
    "Hello",
    " Hello",
    "Hello  world ",
    "\n\n\n\t\t\t x",
    "a▁b ▁▁c▁",
    "ab cd <table><sep>ab  cd <s> </s> <unk> <0x41> [INST]",
    "漢字仮名交じり文を分かち書きしない" * 40,
    "ελληνικάπρίντον" * 40 + "вопросответвопрос" * 40,
    "aaaa" * 5000,
    "    " * 300 + "x",
    "\U0010ffff\x00\x01\x7f e\u0301 👨‍👩‍👧‍👦",
    "x" + " y" * 500,
]


@pytest.fixture(scope="module")
def training_text(source_texts: list[str], mixed_text: str) -> list[str]:
    lines = ("".join(source_texts[:6])[:150_000] + mixed_text[:30_000]).splitlines()
    unspaced = ["漢字仮名交じり文を分かち書きしない", "ελληνικάπρίντον", "вопросответвопрос"] * 40
    return [*unspaced, *(line[:400] for line in lines if line.strip())]


@pytest.fixture(scope="module")
def models(training_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of 1,500 pieces for each shape."""
    folder = tmp_path_factory.mktemp("models")
    for name, options in SHAPES.items():
        file = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(training_text),
            model_writer=file,
            vocab_size=1500,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            character_coverage=0.98,
            minloglevel=2,
            num_threads=1,
            **options,
        )
        (folder / f"{name}.model").write_bytes(file.getvalue())
    return {name: folder / f"{name}.model" for name in SHAPES}


@pytest.fixture(scope="module")
def texts(mixed_text: str) -> list[str]:
    rng = random.Random(1)
    letters = "ab ▁\n\tcdé漢<>0x41 "
    strings = ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(2000)]
    return [*NASTY, *strings, *(mixed_text[n : n + 3000] for n in range(0, 300_000, 30_000))]


@pytest.mark.parametrize("shape", SHAPES)
def test_models_encode_as_sentencepiece_does(shape: str, models: dict[str, Path], texts: list[str]) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(models[shape]))
    ours = open_tokenizer(models[shape])
    assert ours.vocab_size == oracle.vocab_size()
    assert ours.eod_id == oracle.eos_id()
    for text, ids in zip(texts, ours.encode_batch(texts, threads=2)):
        assert ids.tolist() == oracle.encode(text), repr(text[:100])
        if shape != "defaults" or "▁" not in text:  # where it drops several ▁ in front
            assert ours.decode(ids.tolist()) == oracle.decode(ids.tolist())
    assert ours.encode("Hi", add_special_tokens=True) == oracle.encode("Hi", add_bos=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_models_come_back(shape: str, models: dict[str, Path], texts: list[str], tmp_path: Path) -> None:
    """Written again, `sentencepiece` encodes the same with it."""
    ours = open_tokenizer(models[shape])
    write(ours, "sentencepiece", tmp_path / "tokenizer.model")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text, ids in zip(texts, ours.encode_batch(texts)):
        assert oracle.encode(text) == ids.tolist()
    again = open_tokenizer(tmp_path)
    assert np.array_equal(again.vocabulary.merges[:, :3], ours.vocabulary.merges[:, :3])
    assert (again.eod_id, again.special_tokens) == (ours.eod_id, ours.special_tokens)


@pytest.mark.parametrize("shape", ["llama2", "gemma"])
def test_models_as_tokenizer_json(shape: str, models: dict[str, Path], texts: list[str], tmp_path: Path) -> None:
    ours = open_tokenizer(models[shape])
    oracle = tokenizers.Tokenizer.from_file(str(ours.save(tmp_path)))
    again = Tokenizer.from_file(tmp_path)
    for text, ids in zip(texts, ours.encode_batch(texts, allowed_special="all")):
        assert oracle.encode(text, add_special_tokens=False).ids == ids.tolist(), repr(text[:100])
        assert again.encode(text, allowed_special="all") == ids.tolist()
        if "\ufffd" not in (decoded := ours.decode(ids.tolist())):
            assert oracle.decode(ids.tolist(), skip_special_tokens=False) == decoded
    assert oracle.encode("Hi").ids == ours.encode("Hi", add_special_tokens=True)


def metaspace(scheme: str, *, split: bool) -> dict[str, Any]:
    """A Metaspace step."""
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("decoder", ["Sequence", "Metaspace"])
def test_files_with_metaspace(
    decoder: str, scheme: str, split: bool, models: dict[str, Path], texts: list[str]
) -> None:
    document = render(read(models["llama2"])) | {"normalizer": None, "pre_tokenizer": metaspace(scheme, split=split)}
    if decoder == "Metaspace":
        steps = [metaspace(scheme, split=split), {"type": "ByteFallback"}, {"type": "Fuse"}]
        document["decoder"] = {"type": "Sequence", "decoders": steps}
    document = json.loads(json.dumps(document))
    oracle, ours = tokenizers.Tokenizer.from_str(json.dumps(document)), Tokenizer(parse(document))
    around_tokens = ["<s>Hello</s> Hello <s> Hello</s>  </s>", "Hello<s>Hello"]
    for text in [*around_tokens, *texts[:300]]:
        ids = ours.encode(text, allowed_special="all")
        assert ids == oracle.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode("Hello world")) == oracle.decode(oracle.encode("Hello world").ids)
    written = render(ours.vocabulary)
    assert written["pre_tokenizer"] == document["pre_tokenizer"]
    assert render(parse(written)) == written


def test_gemma_s_cut_at_spaces_changes_nothing(models: dict[str, Path], texts: list[str]) -> None:
    document = render(read(models["gemma"]))
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    ours = Tokenizer(parse(document | {"pre_tokenizer": cut}))
    oracle = tokenizers.Tokenizer.from_str(json.dumps(document | {"pre_tokenizer": cut}))
    assert ours.vocabulary.cuts == ()
    digits = {"type": "Digits", "individual_digits": False}
    cutting = Tokenizer(parse(document | {"pre_tokenizer": digits}))
    its_oracle = tokenizers.Tokenizer.from_str(json.dumps(document | {"pre_tokenizer": digits}))
    for text in texts[:200]:
        assert ours.encode(text, allowed_special="all") == oracle.encode(text, add_special_tokens=False).ids
        assert cutting.encode(text, allowed_special="all") == its_oracle.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_of_bytes(shape: str, models: dict[str, Path]) -> None:
    ours = open_tokenizer(models[shape])
    data = b" a  b\xff\xfe\x00 \xe6\xbc\xa2\xe6\xbc \xed\xa0\x80 " + bytes(range(256))
    if shape != "defaults":  # which puts single spaces for several
        assert ours.decode_bytes(ours.encode_bytes(data)) == data
    stream = StreamDecoder(ours)
    ids = ours.encode("né 漢")
    streamed = "".join(map(stream.feed, ids)) + stream.finish()
    assert streamed.removeprefix(" ") == ours.decode(ids) == "né 漢"


def varint(value: int) -> bytes:
    """A number as protocol buffers write it."""
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def with_field(model: bytes, number: int, *fields: bytes) -> bytes:
    """Another message after those of a model; what it says replaces what was said."""
    inner = b"".join(fields)
    return model + varint(number << 3 | 2) + varint(len(inner)) + inner


BPE = b"\x18\x02"
FALLBACK = varint(35 << 3) + b"\x01"
PIECE = b"\x0a\x02zz\x15\x00\x00\x00\x00"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: b"", "it holds no pieces"),
        (lambda m: m[:1000], r"is cut off"),
        (lambda m: m[:1000] + b"\xff" * 20, r"is not a model of SentencePiece"),
        (lambda m: b"\x0f", "wire type 7"),
        (lambda m: b"\x0a" + b"\x80" * 30, r"the number at byte \d+ is cut off"),
        (lambda m: b"\x0a\xff\xff\xff\xff\x7f", r"the field at byte \d+ is cut off"),
        (lambda m: b"\x08\x01" + m, "is not a model of SentencePiece"),
        (lambda m: with_field(m, 1, b"\x0a\x01\xff"), "invalid start byte"),
        (lambda m: with_field(m, 1, PIECE, b"\x18\x05"), r"piece 1500, 'zz'\s+is of type 5, which is not supported"),
        (lambda m: with_field(m, 1, b"\x0a\x02zz\x15\x00\x00\xc0\x7f"), r"with a finite score"),
        (lambda m: with_field(m, 1, b"\x0a\x00"), r"piece 1500, ''\s+must be 1 to 256 bytes"),
        (lambda m: with_field(m, 1, b"\x0a" + varint(300) + b"z" * 300), r"must be 1 to 256 bytes"),
        (lambda m: with_field(m, 1, b"\x0a\x03<s>"), r"a piece\s+is given twice"),
        (lambda m: with_field(m, 1, b"\x0a\x06<0xAA>", b"\x18\x06"), r"a piece\s+is given twice"),
        (lambda m: with_field(m, 1, b"\x0a\x07<0x100>", b"\x18\x06"), r"257 byte pieces\s+must be the 256"),
        (lambda m: with_field(m, 1, "\x0a\x05a𒀀".encode()), r"'a𒀀'\s+holds '𒀀', which is no piece"),
        (lambda m: with_field(m, 2, FALLBACK), r"model type unigram\s+must be BPE"),
        (lambda m: with_field(m, 2, BPE), r"byte_fallback = false\s+must be true"),
        (lambda m: with_field(m, 2, BPE, FALLBACK, varint(24 << 3) + b"\x01"), "treat_whitespace_as_suffix = true"),
        (lambda m: with_field(m, 3, b"\x0a\x08nmt_nfkc\x12\x01x"), r"the table nmt_nfkc\s+is not supported"),
        (lambda m: with_field(m, 3, b"\x28\x00"), r"escape_whitespaces = false\s+is not supported"),
    ],
)
def test_models_that_we_cannot_run(change: Any, message: str, models: dict[str, Path], tmp_path: Path) -> None:
    model = models["llama2"].read_bytes()
    file = tmp_path / "tokenizer.model"
    file.write_bytes(change(model) or b"\n")
    with pytest.raises(TokenizerError, match=message if change(model) else "is cut off"):
        read(file)


def test_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot be read: No such file"):
        open_tokenizer(tmp_path / "tokenizer.model")


def test_damaged_models_never_crash(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["llama2"].read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        damaged = bytearray(model)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "m").write_bytes(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        try:
            read(tmp_path / "m")
        except TokenizerError:
            continue


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vocab", {"<0x41>": None}, r"1 of the 256 byte tokens\s+are not in the vocabulary, the first is <0x41>"),
        ("merges", [["<0x41>", "a"]], r"merge \['<0x41>', 'a'\]\s+joins a byte token"),
        ("ignore_merges", True, r"model\.ignore_merges = True\s+is not supported with byte_fallback"),
        ("decoder", {"type": "WordPiece"}, r"decoder WordPiece\s+is not supported with byte fallback"),
        ("decoder", {"type": "Strip", "content": " ", "start": 0, "stop": 1}, r"decoder Strip\{'content'"),
        ("pre_tokenizer", metaspace("middle", split=True), r"prepend_scheme = middle\s+must be one of always"),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "_"}, r"must write a space as '▁'"),
    ],
)
def test_files_that_we_cannot_run(path: str, value: Any, message: str, models: dict[str, Path]) -> None:
    document = json.loads(json.dumps(render(read(models["llama2"]))))
    if path == "vocab":
        del document["model"]["vocab"]["<0x41>"]
    elif path in document["model"]:
        document["model"][path] = value
    else:
        document[path] = value
    with pytest.raises(TokenizerError, match=message):
        parse(document)


def test_what_the_formats_cannot_say(models: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    gemma = read(models["gemma"])
    prefixed = replace(gemma, normalizer=read(models["llama2"]).normalizer)
    with pytest.raises(TokenizerError, match="user-defined pieces and a space put in front"):
        render(prefixed)
    refused = {
        "its merges run over bytes": tokenizer.vocabulary,
        "its text is cut before the merging": replace(gemma, cuts=(*gemma.cuts, *_digits())),
        "its normaliser does more than write spaces": replace(gemma, normalizer=("NFC", *gemma.normalizer)),
        "its merges are not all the splits of its tokens": replace(gemma, merges=gemma.merges[:-1]),
        "it has no <unk>": replace(gemma, added=tuple(t for t in gemma.added if t.content != "<unk>")),
    }
    for reason, vocabulary in refused.items():
        with pytest.raises(TokenizerError, match=f"cannot be written as a SentencePiece model: {reason}"):
            write(Tokenizer(vocabulary), "sentencepiece", tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def _digits() -> tuple[Any, ...]:
    from megascratch.tokenizer.cutting import Cut

    return (Cut(r"\p{N}"),)
