"""Tensors in the files that torch.save writes, such as `pytorch_model.bin`: nothing in them is executed.

Such a file is a zip archive that holds a pickle, which describes the tensors, and their values. (Files of torch before
1.6 are not archives, and are refused.) `torch.load(weights_only=True)` fails on pickles of protocol 4 and later; the
published growth models were written with protocol 5. This reader takes every protocol. It knows the few functions and
types that a description of tensors needs, and refuses a file that names any other.
"""
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from common.files import UserError, first_line

STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool}


class Sealed:
    """Base of the objects that a pickle may create. The opcode BUILD sets attributes by __setstate__, which is
    refused."""

    def __setstate__(self, state: Any) -> NoReturn:
        raise ValueError("the description changes an object")


class StateDict(dict):
    """Stands for OrderedDict. The attribute _metadata that torch.save writes is dropped."""
    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignores the attributes."""


@dataclass
class Storage(Sealed):
    """Values in a file, from byte `offset` on."""
    dtype: torch.dtype
    numel: int
    offset: int | None = None  # known once the pickle is read


@dataclass(frozen=True)
class BinTensor(Sealed):
    """A tensor in a file, not read yet."""
    storage: Storage
    start: int  # its first value in the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its values."""
        return self.storage.dtype

    def read(self, path: Path) -> torch.Tensor:
        """Returns the tensor, mapped from the file: only pages that are touched are in memory, until it is freed."""
        assert self.storage.offset is not None
        first = self.storage.offset + self.start * self.dtype.itemsize
        begin = first - first % mmap.ALLOCATIONGRANULARITY
        with open(path, "rb") as file:
            values = mmap.mmap(file.fileno(), first - begin + self.span * self.dtype.itemsize, offset=begin,
                               access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(values, dtype=self.dtype, count=self.span, offset=first - begin)
        return flat.as_strided(self.shape, self.strides)

    @property
    def span(self) -> int:
        """The number of values from its first to its last one in the storage."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))


class Rebuild(Sealed):
    """Stands for torch's functions that make a tensor of a storage."""

    def __call__(self, storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> BinTensor:
        """As torch._utils._rebuild_tensor_v2. Raises ValueError unless the storage holds all values of the tensor."""
        numbers = [start, *shape, *strides]
        if not isinstance(storage, Storage) or len(shape) != len(strides) or \
                not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
            raise ValueError("a tensor is described by other things than a storage and numbers")
        tensor = BinTensor(storage, start, tuple(shape), tuple(strides))
        values = math.prod(tensor.shape)
        if not 0 < values <= storage.numel or start + tensor.span > storage.numel:
            raise ValueError("a tensor has no values, or more than its storage")
        return tensor


class RebuildParameter(Rebuild):
    """As torch._utils._rebuild_parameter."""

    def __call__(self, data: Any, *_: Any) -> BinTensor:
        """Returns the tensor of a parameter. Raises ValueError if it is not one."""
        if not isinstance(data, BinTensor):
            raise ValueError("a parameter is not a tensor")
        return data


class RebuildFromType(Rebuild):
    """As torch._tensor._rebuild_from_type_v2, for tensors and parameters. Attributes of the tensor are dropped."""

    def __call__(self, function: Any, kind: Any, arguments: Any, *_: Any) -> BinTensor:
        """Returns the tensor that a function makes. Raises ValueError for an unknown function or type."""
        if not isinstance(function, Rebuild) or kind not in ("Tensor", "Parameter"):
            raise ValueError("a tensor is made by an unknown function")
        return function(*arguments)


# All that a pickle may name, and what stands for it. None of it can be changed by the pickle.
ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": StateDict, "torch.Tensor": "Tensor", "torch.nn.parameter.Parameter": "Parameter",
    "torch._utils._rebuild_tensor_v2": Rebuild(), "torch._utils._rebuild_parameter": RebuildParameter(),
    "torch._tensor._rebuild_from_type_v2": RebuildFromType(),
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()}}


class TensorUnpickler(pickle.Unpickler):
    """Reads a description of tensors. Raises UserError for a name that is not ALLOWED, and ValueError for an object
    with a number beyond the length of the description, which would take as much memory as the number says."""

    def __init__(self, file: BinaryIO, path: Path):
        start = file.tell()
        for opcode, argument, position in pickletools.genops(file):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > (position or 0):
                raise ValueError(f"the description numbers an object {argument}")
        file.seek(start)
        super().__init__(file)
        self.path = path
        self.storages: dict[str, Storage] = {}  # by their keys in the file

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a function or a type. Every opcode that could call something gets it from here."""
        full_name = f"{module}.{name}"
        if full_name not in ALLOWED:
            known = ", ".join(name for name in ALLOWED if "Storage" not in name)
            raise UserError(f"{self.path} is refused: it holds {full_name!r:.100}, and a file of weights needs none "
                            f"but {known} and torch's storages. Use weights in safetensors files instead")
        return ALLOWED[full_name]

    def persistent_load(self, pid: Any) -> Storage:
        """Returns the storage that a persistent id names: ("storage", dtype, key, device, number of values)."""
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or \
                type(numel) is not int or numel < 0 or any(view):
            raise ValueError("a storage is described by other things than a type, a key and a number")
        storage = self.storages.setdefault(key, Storage(dtype, numel))
        if (storage.dtype, storage.numel) != (dtype, numel):
            raise ValueError(f"the storage {key!r:.50} is described twice, in different ways")
        return storage


def read_bin(path: str | Path) -> dict[str, BinTensor]:
    """Returns the tensors in a file by their names. Reads no values.

    Raises UserError if the file is damaged, or if it holds anything else.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                if file.read(2) not in (b"", b"PK"):
                    raise UserError(f"{path} is not a zip archive, as torch.save writes it since torch 1.6: load and "
                                    "save it again with a newer torch, or download it again")
                raise ValueError("the end of the archive is missing")
            content, storages = read_archive(file, path)
            size = file.seek(0, 2)
        for key, storage in storages.items():
            if storage.offset is None or storage.offset + storage.numel * storage.dtype.itemsize > size:
                raise ValueError(f"the values of the storage {key!r:.50} are missing")
    except (UserError, MemoryError, PermissionError):
        raise
    except Exception as error:  # a damaged pickle or archive raises errors of almost any type
        raise UserError(f"{path} is truncated, damaged or not a file of weights ({first_line(error):.200}): download "
                        "or copy it again") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} holds {type(content).__name__}, expected an object from names to tensors")
    for name, tensor in content.items():
        if not isinstance(tensor, BinTensor):
            raise UserError(f"{path}: {name} is {type(tensor).__name__}, expected a tensor")
    return dict(content)


def read_archive(file: BinaryIO, path: Path) -> tuple[Any, dict[str, Storage]]:
    """Reads the description in a zip archive: returns what it holds, and its storages."""
    with zipfile.ZipFile(file) as archive:
        records = {name.partition("/")[2]: record for name, record in zip(archive.namelist(), archive.infolist())}
        if records["data.pkl"].compress_type != zipfile.ZIP_STORED:
            raise ValueError("its description is compressed")
        if (order := records.get("byteorder")) and (order.file_size > 16 or archive.read(order) != b"little"):
            raise ValueError("its numbers are not little-endian")
        with archive.open(records["data.pkl"]) as pickled:
            unpickler = TensorUnpickler(pickled, path)  # type: ignore[arg-type]
            content = unpickler.load()
    for key, storage in unpickler.storages.items():
        record = records[f"data/{key}"]
        if record.compress_type != zipfile.ZIP_STORED or record.file_size < storage.numel * storage.dtype.itemsize:
            raise ValueError(f"the values of the storage {key!r:.50} are compressed or missing")
        storage.offset = data_offset(file, record.header_offset)
    return content, unpickler.storages


def data_offset(file: BinaryIO, header_offset: int) -> int:
    """Returns the offset of a record's data: after its 30-byte header, which has the lengths of the name and the extra
    field that follow."""
    file.seek(header_offset)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
    if signature != b"PK\x03\x04":
        raise ValueError("a record of the archive has no header")
    return header_offset + 30 + name_length + extra_length
