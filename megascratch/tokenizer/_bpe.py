"""The compiled core of the tokenizer (csrc/host/bpe.cpp), at the highest instruction-set level that runs here.

`_bpe.pyi` has its types. setup.py builds a module a level; the lowest runs everywhere, and is asked what else does.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def _built_for(level: str) -> str | None:
    name = f"{__package__}._bpe_{level}"
    return name if find_spec(name) else None


def _chosen() -> ModuleType:
    lowest = import_module(_built_for("v2") or f"{__package__}._bpe_baseline")
    higher = _built_for("v3")
    return import_module(higher) if higher and lowest.runs_v3() else lowest


_module = _chosen()
UNICODE_VERSION = _module.UNICODE_VERSION
PieceCounter = _module.PieceCounter
Encoder = _module.Encoder
Decoder = _module.Decoder
scan = _module.scan
character_classes = _module.character_classes
