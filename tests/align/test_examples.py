"""Records become tokens: what is learned, what is cut, what is refused, with file and line."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from alignment import open_saved, recipe, save_tokenizer, turns, write_records

from megascratch.align.conversations import demonstration, labelled, preference, prompt
from megascratch.align.examples import encode_pieces, read_examples
from megascratch.align.preview import shown
from megascratch.errors import DataError, TokenizerError
from megascratch.log import make_console
from megascratch.tokenizer.chat import ChatTemplate

QUIET = make_console(rank=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _examples(tokenizer: Path, tmp_path: Path, records: list[Any], reader: Any = demonstration, **sections: Any) -> Any:
    records_file = write_records(tmp_path / "data.jsonl", records)
    return read_examples(recipe(tokenizer, records_file, tmp_path, **sections), reader, QUIET)


def _learned(tokenizer: Path, example: Any) -> list[str]:
    """What is learned of each sequence, as text, stretch by stretch."""
    opened = open_saved(tokenizer)
    texts = []
    for sequence in example.sequences:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sequence.learned.astype(int), [0]])))
        texts.append("|".join(opened.decode(sequence.ids[a:b]) for a, b in edges.reshape(-1, 2)))
    return texts


def test_every_turn_of_the_assistant_is_learned_and_nothing_else(tokenizer: Path, tmp_path: Path) -> None:
    conversation = {"messages": turns("what?", "seven.", "and now?", "eight.")}
    [example] = _examples(tokenizer, tmp_path, [conversation])
    assert _learned(tokenizer, example) == ["seven.<|im_end|>\n|eight.<|im_end|>\n"]
    whole = open_saved(tokenizer).decode(example.sequences[0].ids)
    assert whole == ChatTemplate.preset("chatml").render(conversation["messages"])
    assert "<|im_end|>" in shown(example.sequences[0], open_saved(tokenizer)).plain


@pytest.mark.parametrize(
    ("record", "learned"),
    [
        ({"prompt": "what? ", "completion": "seven"}, ["seven<|endoftext|>"]),
        ({"prompt": turns("what?"), "completion": "seven"}, ["seven<|im_end|>\n"]),
        ({"prompt": turns("what?", "six", "no"), "completion": turns("", "seven")[1:]}, ["seven<|im_end|>\n"]),
    ],
)
def test_of_a_completion_only_what_follows_the_prompt(
    record: dict[str, Any], learned: list[str], tokenizer: Path, tmp_path: Path
) -> None:
    [example] = _examples(tokenizer, tmp_path, [record])
    assert _learned(tokenizer, example) == learned


def test_pairs_share_their_beginning(tokenizer: Path, tmp_path: Path) -> None:
    pair = {"chosen": turns("what?", "seven", "sure?", "yes"), "rejected": turns("what?", "seven", "sure?", "no")}
    with_prompt = {"prompt": "what? ", "chosen": "seven", "rejected": "six", "margin": 1.5}
    first, second = _examples(tokenizer, tmp_path, [pair, with_prompt], preference, data={"seq_length": 128})
    assert _learned(tokenizer, first) == ["yes<|im_end|>\n", "no<|im_end|>\n"]
    assert _learned(tokenizer, second) == ["seven<|endoftext|>", "six<|endoftext|>"]
    assert (first.values, second.values) == ({"margin": 0.0}, {"margin": 1.5})


def test_labels_and_answers(tokenizer: Path, tmp_path: Path) -> None:
    [example] = _examples(tokenizer, tmp_path, [{"prompt": "a", "completion": "b", "label": False}], labelled)
    assert example.values == {"desirable": 0.0}
    asked = prompt({"prompt": turns("2 + 2?"), "answer": 4}, ChatTemplate.preset("chatml"))
    assert asked.answer == "4"
    [ids] = encode_pieces(open_saved(tokenizer), asked.pieces)
    assert open_saved(tokenizer).decode(ids).endswith("<|im_start|>assistant\n")


def test_parquet_holds_conversations_too(tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    rows = [{"messages": turns("what?", "seven")}, {"messages": turns("why?", "no")}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    examples = read_examples(recipe(tokenizer, file, tmp_path), demonstration, QUIET)
    assert [example.where for example in examples] == [f"{file}, row 0", f"{file}, row 1"]
    assert _learned(tokenizer, examples[1]) == ["no<|im_end|>\n"]


GOOD = {"messages": turns("what?", "seven")}


@pytest.mark.parametrize(
    ("record", "reader", "message"),
    [
        ("{not json", demonstration, r"line 2: the line +is not JSON"),
        ("[1]", demonstration, r"line 2: the line +is no JSON object: list"),
        ({"text": "x"}, demonstration, r"line 2: prompt +is missing +give prompt, completion or messages"),
        ({"messages": turns("what?")}, demonstration, r"line 2: the conversation +has no assistant message"),
        ({"messages": []}, demonstration, r"line 2: messages +must be a list of messages"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            demonstration,
            r"messages\[0\]\.role = 'robot' +must be one",
        ),
        ({"messages": turns("what?", "")}, demonstration, r"line 2: messages\[1\]\.content +is empty"),
        ({"messages": turns("what?", "  ")}, demonstration, r"line 2: messages\[1\]\.content +is blank"),
        ({"messages": turns("what?", "x" * 400)}, demonstration, r"line 2: \d+ tokens +are more than 65, as chat"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, preference, r"line 2: chosen and rejected +are the same"),
        ({"prompt": "a", "chosen": "b"}, preference, r"line 2: rejected +is missing"),
        ({"chosen": turns("a", "b"), "rejected": turns("c", "d")}, preference, r"have no message in common"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}, preference, r"margin = '1' +must be a number"),
        ({"prompt": "a", "completion": "b", "label": 1}, labelled, r"line 2: label = 1 +must be true or false"),
    ],
)
def test_a_bad_record_is_told_with_file_and_line(
    record: Any, reader: Any, message: str, tokenizer: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good: dict[str, Any] = GOOD
    if reader is not demonstration:
        good = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b", "label": True}
    sections = {"chat": {"template": "chatml", "truncation": "drop", "strict": True}}
    with pytest.raises(DataError, match=message):
        _examples(tokenizer, tmp_path, [good, record], reader, **sections)
    # Unless asked to be strict, the run goes on with the rest.
    file = write_records(tmp_path / "data.jsonl", [good, record])
    lenient = recipe(tokenizer, file, tmp_path, chat={"template": "chatml", "truncation": "drop"})
    assert len(read_examples(lenient, reader, make_console())) == 1
    assert "line 2" in capfd.readouterr().err


def test_truncation_keeps_what_it_says(tokenizer: Path, tmp_path: Path) -> None:
    long = {"messages": turns("what is the answer?", " ".join(f"w{i}" for i in range(40)), "and?", "seven")}
    [whole] = _examples(tokenizer, tmp_path, [long], data={"seq_length": 500})
    ids = whole.sequences[0].ids
    for policy, kept in (("keep_start", ids[:33]), ("keep_end", ids[-33:])):
        chat = {"template": "chatml", "truncation": policy}
        [example] = _examples(tokenizer, tmp_path, [long], data={"seq_length": 32}, chat=chat)
        assert np.array_equal(example.sequences[0].ids, kept)
    assert not example.sequences[0].learned[0], "the first token has nothing before it"
    chat = {"template": "chatml", "truncation": "error"}
    with pytest.raises(DataError, match=r"line 2: .* tokens +are more than 33, as chat\.truncation = error"):
        _examples(tokenizer, tmp_path, [GOOD, long], data={"seq_length": 32}, chat=chat)


# In the manner of stock templates that mark nothing, or write no assistant turn at all.
MARKS_NOTHING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WRITES_NO_ANSWER = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}\n{% endfor %}"


def test_a_template_without_marks_still_gives_a_mask_and_one_without_answers_is_an_error(
    tokenizer: Path, tmp_path: Path
) -> None:
    """Under `assistant_only_loss`, stock templates without {% generation %} marks give a mask of zeros."""
    file = tmp_path / "template.jinja"
    file.write_text(MARKS_NOTHING)
    [example] = _examples(tokenizer, tmp_path, [GOOD], chat={"template": str(file)})
    assert _learned(tokenizer, example) == ["seven\n"]
    file.write_text(WRITES_NO_ANSWER)
    with pytest.raises(DataError, match=r"nothing is left.*\n.*message 1 +leaves no text of the assistant's"):
        _examples(tokenizer, tmp_path, [GOOD, GOOD], chat={"template": str(file)})
    file.write_text("{% for %}")
    with pytest.raises(TokenizerError, match="is not a template of Jinja"):
        _examples(tokenizer, tmp_path, [GOOD], chat={"template": str(file)})
    with pytest.raises(TokenizerError, match=r"has no chat template.*use a preset"):
        _examples(tokenizer, tmp_path, [GOOD], chat={"template": None})
