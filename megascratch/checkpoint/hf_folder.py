"""A folder in Hugging Face's format, opened for reading: its tensors, and the tables beside them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megascratch.checkpoint.format import DTYPES, damage, whole
from megascratch.checkpoint.source import Kind
from megascratch.dist.layout import Box

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_LARGEST_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class Folder:
    """A folder in Hugging Face's format.

    Attributes:
        path: of the folder.
        config: its `config.json`.
        files: the file that holds each tensor.
        kinds: dtype and shape of each tensor.
    """

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, str]
    kinds: Mapping[str, Kind]

    @classmethod
    def open(cls, path: Path) -> "Folder":
        """Find the tensors and read every file's header.

        Raises: CheckpointError: if a file is missing or damaged, or the weights are pickles.
        """
        config = read_json(path, CONFIG)
        names = cls._weight_files(path)
        files: dict[str, str] = {}
        kinds: dict[str, Kind] = {}
        for name in names:
            try:
                with safe_open(path / name, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118
                        part = tensors.get_slice(key)
                        dtype = DTYPES.get(part.get_dtype())
                        if dtype is None:
                            rule = f"is {part.get_dtype()}, a quantised weight"
                            raise damage(path, f"{name}, tensor {key}", rule, "convert the unquantised model")
                        files[key], kinds[key] = name, Kind(dtype, tuple(part.get_shape()))
            except FileNotFoundError:
                raise damage(path, name, "is missing", "download the folder again") from None
            except (SafetensorError, OSError) as error:
                raise damage(path, name, f"is damaged: {error}", "download the folder again") from None
        return cls(path, config, files, kinds)

    @staticmethod
    def _weight_files(path: Path) -> list[str]:
        if (path / INDEX).is_file():
            weight_map = read_json(path, INDEX).get("weight_map")
            names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
            plain = {n for n in names if isinstance(n, str) and n.endswith(".safetensors") and Path(n).name == n}
            if not names or names != plain:
                raise damage(path, INDEX, "must name *.safetensors files in the folder itself", "download it again")
            return sorted(plain)
        if (path / SINGLE).is_file():
            return [SINGLE]
        if any(path.glob("*.bin")) or any(path.glob("*.pt")):
            remedy = "save it with transformers: model.save_pretrained(folder, safe_serialization=True)"
            raise damage(path, "*.bin", "are pickles, which can run code when they are opened", remedy)
        raise damage(path, path.name, f"holds neither {SINGLE} nor {INDEX}", "give a folder in Hugging Face's format")

    def read(self, name: str, box: Box) -> Tensor:
        """Return a box of a tensor."""
        with safe_open(self.path / self.files[name], framework="pt") as tensors:
            if box == whole(self.kinds[name].shape):
                tensor: Tensor = tensors.get_tensor(name)
                return tensor
            part: Tensor = tensors.get_slice(name)[box]
            return part


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read a file of a folder that must hold a table.

    Raises: CheckpointError: if it is missing, too large, or something else.
    """
    file = path / name
    remedy = "give a folder in Hugging Face's format"
    try:
        if file.stat().st_size > _LARGEST_JSON_BYTES:
            raise damage(path, name, f"has more than the {_LARGEST_JSON_BYTES} bytes it may have", remedy)
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise damage(path, name, f"cannot be read: {error.strerror}", remedy) from None
    except (ValueError, RecursionError):
        raise damage(path, name, "is not JSON", remedy) from None
    if not isinstance(value, dict):
        raise damage(path, name, "must hold a table", remedy)
    return value
