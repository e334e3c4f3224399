"""Pickles of other software, read without running anything that stands in them.

A pickle is a program: it names functions and calls them. Two kinds are met here, and both are read in such a way that
a name can only mean what we say it means:

    .metadata of a distributed checkpoint    our unpickler knows a fixed list of classes; each is an inert record here
    *.pt of torch.save                       torch's `weights_only` unpickler; classes of Megatron-LM and numpy that
                                             stand beside the weights are inert records, too

Any other name is refused. Files are bounded before they are read: nothing in them is compressed, and the part that is
a pickle is small.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megascratch.checkpoint.format import damage
from megascratch.errors import CheckpointError

LARGEST_PICKLE_BYTES = 256 << 20
_REMEDY = "don't use it: it may be made to harm"
# Of classes beside the weights: nothing of them is needed, but the names and values of arguments.
_INERT_MODULES = ("argparse", "megatron", "numpy", "transformer_engine", "apex", "torch", "collections", "pathlib")


class Inert:
    """What stands for an instance of any class: it keeps what it was made from, and does nothing.

    Attributes:
        state: what was set on it.
        arguments: what it was called with.
    """

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.arguments, self.state = arguments, {}

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        made = super().__new__(cls)
        made.arguments, made.state = (), {}
        return made

    state: Any
    arguments: tuple[Any, ...]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute of the instance."""
        return self.state.get(name, default) if isinstance(self.state, Mapping) else default


_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    _METADATA: (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
    "torch": ("device",),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that a distributed checkpoint's metadata is made of, as inert records."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return type(name, (Inert,), {})
        if module == "torch" and name in _DTYPES:
            return _Constant(_DTYPES[name])
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"names {module}.{name}")


class _Constant:
    """A value that a pickle names; not callable, so that it can be nothing else."""

    def __init__(self, value: Any) -> None:
        self.value = value


def read_metadata(path: Path) -> Inert:
    """Read the `.metadata` of a distributed checkpoint.

    Raises: CheckpointError: if it is missing, too large, or names what no such file has.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_PICKLE_BYTES:
            raise damage(path.parent, path.name, f"has {size} bytes, more than the {LARGEST_PICKLE_BYTES} it may have")
        value = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise damage(path.parent, path.name, f"cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        raise damage(path.parent, path.name, f"is no metadata of a checkpoint: {str(error)[:200]}", _REMEDY) from None
    except Exception as error:  # a pickle can fail in as many ways as there are programs
        raise damage(path.parent, path.name, f"is damaged: {type(error).__name__}") from None
    if not isinstance(value, Inert):
        raise damage(path.parent, path.name, "is no metadata of a checkpoint", _REMEDY)
    return value


def constant(value: Any) -> Any:
    """Return what a `.metadata` names, or None where it is something else."""
    return value.value if isinstance(value, _Constant) else None


def check_archive(file: BinaryIO, length: int, where: Path, name: str) -> None:
    """Check that a file of torch.save is what it may be, before torch opens it.

    Args:
        file: opened at its beginning.
        length: in bytes.
        where, name: of it, for the message.

    Raises: CheckpointError: if it is no archive, is compressed, or holds more pickle or more at all than it can.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except Exception as error:  # the reader of archives raises whatever comes
        raise damage(where, name, f"is no archive of torch.save: {error}"[:300]) from None
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > length for entry in entries):
        raise damage(where, name, "is compressed, which torch.save never does", _REMEDY)
    if any(entry.filename.endswith(".pkl") and entry.file_size > LARGEST_PICKLE_BYTES for entry in entries):
        raise damage(where, name, f"holds a pickle of more than {LARGEST_PICKLE_BYTES} bytes", _REMEDY)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file of torch.save: where its bytes stand.

    Attributes:
        path: of the file.
        dtype, shape: of the tensor.
        offset: of its first byte.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, path: Path, tensor: Tensor) -> "StoredTensor":
        """Return where a tensor from `load_torch_file` stands.

        Raises: CheckpointError: if it is not row by row, or not all in the file.
        """
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        offset = -1 if start is None else start + int(tensor.storage_offset()) * tensor.itemsize
        n_bytes = tensor.numel() * tensor.itemsize
        if offset < 0 or not tensor.is_contiguous() or offset + n_bytes > path.stat().st_size:
            rule = f"holds a tensor {list(tensor.shape)} that is not whole, row by row, in the file"
            raise damage(path.parent, path.name, rule)
        return cls(path, tensor.dtype, tuple(tensor.shape), offset)

    def read(self) -> Tensor:
        """Return its values."""
        values = torch.empty(self.shape, dtype=self.dtype)
        if self.shape and values.numel():
            with self.path.open("rb") as file:
                file.seek(self.offset)
                file.readinto(values.view(-1).view(torch.uint8).numpy().data)
        return values


def load_torch_file(path: Path) -> Any:
    """Open a file of torch.save. Its tensors have shapes and no values (`StoredTensor`); what else it holds is inert.

    Raises: CheckpointError: if it is missing or damaged, or names what no checkpoint has.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            check_archive(file, size, path.parent, path.name)
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if strange := [name for name in named if name.split(".")[0] not in _INERT_MODULES]:
            raise damage(path.parent, path.name, f"names {', '.join(strange[:5])}"[:300], _REMEDY)
        with FakeTensorMode(), torch.serialization.safe_globals([(Inert, name) for name in named]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise damage(path.parent, path.name, f"cannot be read: {error.strerror or error}") from None
    except CheckpointError:
        raise
    except Exception as error:  # a pickle can fail in as many ways as there are programs
        rule = f"cannot be opened: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise damage(path.parent, path.name, rule[:300]) from None
