"""tokenizer, preprocess, merge and inspect, through the command line."""

import json
from pathlib import Path

import pytest
from command_line import Files, Run

TEXT = "def read(path): naïve 12345 <|endoftext|>\n"


def test_encode_and_decode_are_inverse(run: Run, files: Files) -> None:
    encoded = run("tokenizer", "encode", "--tokenizer", files.tokenizer, TEXT)
    assert encoded.code == 0
    decoded = run("tokenizer", "decode", "--tokenizer", files.tokenizer, *encoded.out.split())
    assert (decoded.code, decoded.out) == (0, TEXT)


def test_special_tokens_in_text_are_text_unless_allowed(run: Run, files: Files) -> None:
    plain = run("tokenizer", "encode", "--tokenizer", files.tokenizer, "<|endoftext|>").out.split()
    special = run("tokenizer", "encode", "--tokenizer", files.tokenizer, "--allow-special", "<|endoftext|>").out.split()
    assert len(plain) > 1
    assert special == ["299"]


def test_decode_refuses_what_is_no_id(run: Run, files: Files) -> None:
    finished = run("tokenizer", "decode", "--tokenizer", files.tokenizer, "12", "x1", "300")
    assert (finished.code, finished.out) == (2, "")
    assert "x1  is not a token id  give whole numbers" in finished.err
    finished = run("tokenizer", "decode", "--tokenizer", files.tokenizer, "300")
    assert (finished.code, finished.out) == (2, "")
    assert "token id 300  must be from 0 to 299" in finished.err


def test_train_overwrites_only_when_told(run: Run, files: Files, tmp_path: Path) -> None:
    output = tmp_path / "tokenizer.json"
    output.write_text("mine")
    arguments = ["tokenizer", "train", "--vocab-size", "280", "--output", output, files.corpus]
    finished = run(*arguments)
    assert (finished.code, output.read_text()) == (2, "mine")
    assert "exists already  add --overwrite" in finished.err
    finished = run(*arguments, "--overwrite")
    assert (finished.code, finished.out) == (0, f"{output}: 280 ids, 1 of them special\n")
    assert json.loads(output.read_text())["model"]["type"] == "BPE"


def test_train_tells_all_problems_at_once(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "tokenizer.json"
    finished = run(
        "tokenizer", "train", "--vocab-size", "100", "--pattern", "gpt3", "--output", output, "nothing.jsonl"
    )
    assert finished.code == 2
    assert finished.err.startswith("3 problems")
    assert not output.exists()


def test_export_to_tiktoken_and_back(run: Run, files: Files, tmp_path: Path) -> None:
    ranks, folder = tmp_path / "ranks.tiktoken", tmp_path / "back"
    assert run("tokenizer", "export", files.tokenizer, ranks, "--to", "tiktoken").code == 0
    back = run("tokenizer", "export", ranks, folder, "--pattern", "cl100k", "--special-token", "<|endoftext|>=299")
    assert (back.code, back.out) == (0, f"{folder / 'tokenizer.json'}: 300 ids\n")
    ours = run("tokenizer", "encode", "--tokenizer", files.tokenizer, TEXT).out
    assert run("tokenizer", "encode", "--tokenizer", folder, TEXT).out == ours


def test_export_to_megatron_and_back(run: Run, files: Files, tmp_path: Path) -> None:
    made, folder, back = tmp_path / "made", tmp_path / "folder", tmp_path / "back.json"
    train = ["tokenizer", "train", "--vocab-size", "300", "--pattern", "gpt2", "--output", made, files.corpus]
    assert run(*train).code == 0
    exported = run("tokenizer", "export", made, folder, "--to", "megatron")
    assert (exported.code, exported.out) == (0, f"{folder / 'vocab.json'} and {folder / 'merges.txt'}: 300 ids\n")
    assert run("tokenizer", "export", folder, back).code == 0
    ours = run("tokenizer", "encode", "--tokenizer", made, TEXT).out
    assert run("tokenizer", "encode", "--tokenizer", back, TEXT).out == ours
    (folder / "vocab.json").unlink()
    again = run("tokenizer", "export", made, folder, "--to", "megatron")
    assert again.code == 2 and "merges.txt  exists already  add --overwrite" in again.err
    model = run("tokenizer", "export", made, tmp_path / "m", "--to", "sentencepiece")
    assert model.code == 2 and "its merges run over bytes" in model.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ranks.tiktoken", "out"], "ranks.tiktoken  cannot be read: No such file"),
        (["ranks.tiktoken", "out", "--pattern", "gpt2", "--special-token", "x"], "must have the form TEXT=ID"),
        (["tokenizer.json", "out", "--pattern", "gpt2"], "belongs to a rank file (.tiktoken)"),
        (["tokenizer.json", "out"], "tokenizer.json"),
    ],
)
def test_export_refuses(run: Run, arguments: list[str], message: str) -> None:
    finished = run("tokenizer", "export", *arguments)
    assert finished.code == 2
    assert message in finished.err


def test_preprocess_reports_what_it_wrote(run: Run, files: Files, tmp_path: Path) -> None:
    prefix = tmp_path / "out"
    arguments = ["--input", files.corpus, "--input", files.corpus, "--tokenizer", files.tokenizer]
    finished = run("preprocess", *arguments, "--output-prefix", prefix, "--workers", "2")
    assert finished.code == 0
    assert f"{prefix}_text_document: 400 documents," in finished.out
    assert Path(f"{prefix}_text_document.bin").exists()


def test_preprocess_stops_at_a_bad_line_or_leaves_it_out(run: Run, files: Files, tmp_path: Path) -> None:
    corpus, prefix = tmp_path / "bad.jsonl", tmp_path / "out"
    corpus.write_text('{"text": "good"}\n{"text": \n{"txt": "good"}\n')
    arguments = ["preprocess", "--input", corpus, "--tokenizer", files.tokenizer, "--output-prefix", prefix]
    finished = run(*arguments)
    assert (finished.code, finished.out) == (2, "")
    assert str(corpus) in finished.err
    assert "line 2" in finished.err
    assert not list(tmp_path.glob("out_*"))
    finished = run(*arguments, "--on-error", "skip")
    assert finished.code == 2
    assert "left 1 finished parts  add --resume to continue it" in finished.err
    finished = run(*arguments, "--on-error", "skip", "--resume")
    assert finished.code == 0
    assert "1 documents" in finished.out
    assert "2 bad lines" in finished.out
    assert f"left out {corpus}:2" in finished.err


def test_preprocess_refuses_a_line_over_the_limit(run: Run, files: Files, tmp_path: Path) -> None:
    corpus = tmp_path / "long.jsonl"
    corpus.write_text(json.dumps({"text": "a" * (3 << 20)}))
    arguments = ["preprocess", "--input", corpus, "--tokenizer", files.tokenizer, "--output-prefix", tmp_path / "out"]
    finished = run(*arguments, "--max-document-mb", "2")
    assert (finished.code, finished.out) == (2, "")
    assert "is longer than 2,097,152 bytes" in finished.err
    assert "--max-document-mb" in finished.err
    assert not list(tmp_path.glob("out*"))


def test_merge_and_inspect(run: Run, files: Files, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    arguments = ["merge", files.dataset, files.dataset, "--output-prefix", merged]
    assert run(*arguments).out.startswith(f"{merged}: 400 documents, ")
    again = run(*arguments)
    assert again.code == 2
    assert "exist" in again.err

    shown = run("inspect", f"{merged}.bin", "--tokenizer", files.tokenizer, "--documents", "1")
    assert shown.code == 0
    assert "400 in 400 sequences" in shown.out
    assert "def function_0(path):" in shown.out
    assert "function_1" not in shown.out


def test_inspect_a_dataset_without_a_tokenizer_shows_ids(run: Run, files: Files) -> None:
    shown = run("inspect", files.dataset)
    assert shown.code == 0
    assert "add --tokenizer to see text" in shown.out


def test_inspect_a_tokenizer(run: Run, files: Files) -> None:
    shown = run("inspect", files.tokenizer)
    assert shown.code == 0
    assert "300, of which 1 special" in shown.out
    assert "<|endoftext|> = 299" in shown.out
    assert "bytes a token" in shown.out


@pytest.mark.parametrize("name", ["nothing", "corpus.txt"])
def test_inspect_refuses_anything_else(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    finished = run("inspect", tmp_path / name)
    assert (finished.code, finished.out) == (2, "")
    assert "no such file" in finished.err or "is no dataset" in finished.err


def test_truncated_dataset_is_one_message(run: Run, files: Files, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        data = Path(f"{files.dataset}{suffix}").read_bytes()
        (tmp_path / f"cut{suffix}").write_bytes(data[: -10 if suffix == ".bin" else None])
    finished = run("inspect", tmp_path / "cut")
    assert (finished.code, finished.out) == (2, "")
    assert "truncated" in finished.err
    assert len(finished.err.splitlines()) == 2


def test_a_rank_file_is_a_tokenizer_too(run: Run, files: Files, tmp_path: Path) -> None:
    exported = run("tokenizer", "export", "--to", "tiktoken", files.tokenizer, tmp_path / "x.tiktoken")
    assert exported.code == 0, exported.err
    corpus = tmp_path / "two.jsonl"
    corpus.write_text(json.dumps({"text": TEXT.replace("<|endoftext|>", "")}) + "\n")
    written = []
    for name, tokenizer in (("json", files.tokenizer), ("ranks", tmp_path / "x.tiktoken")):
        prefix = tmp_path / name
        finished = run("preprocess", "--input", corpus, "--tokenizer", tokenizer, "--output-prefix", prefix)
        assert finished.code == 0, finished.err
        assert "regex" not in finished.err
        written.append((tmp_path / f"{name}_text_document.bin").read_bytes())
    assert written[0] == written[1]


def test_a_pattern_without_a_scanner_says_that_it_is_slow(run: Run, files: Files, tmp_path: Path) -> None:
    described = json.loads(Path(files.tokenizer).read_text())
    [split] = [step for step in described["pre_tokenizer"]["pretokenizers"] if step["type"] == "Split"]
    split["pattern"]["Regex"] += r"|\p{L}"
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    corpus = tmp_path / "one.jsonl"
    corpus.write_text(json.dumps({"text": "some text"}) + "\n")
    arguments = ("--input", corpus, "--tokenizer", tmp_path, "--output-prefix", tmp_path / "out")
    finished = run("preprocess", *arguments)
    assert finished.code == 0, finished.err
    assert "no scanner of ours knows this tokenizer's pattern" in finished.err
