"""Generation: open a checkpoint, sample tokens with cached keys and values, stream them as text."""

from megascratch.infer.decoding import Completion, Step, complete, decode, generate
from megascratch.infer.load import load_model, open_tokenizer, read_config
from megascratch.infer.sampling import Sampling, filtered, sample
from megascratch.infer.text import generate_text, stream_text

__all__ = [
    "Completion",
    "Sampling",
    "Step",
    "complete",
    "decode",
    "filtered",
    "generate",
    "generate_text",
    "load_model",
    "open_tokenizer",
    "read_config",
    "sample",
    "stream_text",
]
