"""What a model is trained on, shown token by token: what is only read is dimmed, what is learned is not.

chat.jsonl, line 1: 21 tokens, 4 learned
<|im_start|>·user·⏎·Hi·<|im_end|>· …
"""

from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megascratch.align.examples import Reader, TokenSequence, read_examples
from megascratch.config import Config
from megascratch.log import make_console
from megascratch.tokenizer import Tokenizer, formats


def show_examples(config: Config, reader: Reader, n_examples: int) -> None:
    """Print the first examples that a recipe trains on, to stdout.

    Raises: DataError, TokenizerError: as `read_examples`.
    """
    assert config.data.tokenizer is not None
    tokenizer = formats.open_tokenizer(Path(config.data.tokenizer))
    console = Console(highlight=False, soft_wrap=True)
    for example in islice(read_examples(config, reader, make_console()), n_examples):
        values = "".join(f", {name} {value:g}" for name, value in example.values.items())
        for sequence in example.sequences:
            counts = f"{len(sequence.ids):,} tokens, {int(sequence.learned.sum()):,} learned"
            console.print(Text(f"{example.where}: {counts}{values}", style="bold"))
            console.print(shown(sequence, tokenizer))


def shown(sequence: TokenSequence, tokenizer: Tokenizer) -> Text:
    """Return a sequence's tokens, a dot between any two."""
    text = Text()
    for n, (id, learned) in enumerate(zip(sequence.ids.tolist(), sequence.learned.tolist())):
        style = "bold green" if learned else "dim"
        token = tokenizer.token_bytes(id).decode(errors="backslashreplace").replace("\n", "⏎")
        text.append("·" if n else "", style="dim")
        text.append(token, style=style)
    return text
