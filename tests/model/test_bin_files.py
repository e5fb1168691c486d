"""Files of torch.save: each way of writing them is read, and nothing in them is executed."""
import copyreg
import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch

from bench.workload import incremental_save
from common.files import UserError
from model.bin_files import read_bin

STATE = {"matrix": torch.arange(12.0).view(3, 4), "half": torch.arange(5.0).bfloat16(), "scalar": torch.tensor(7.0),
         "whole": torch.arange(6), "transposed": torch.arange(6.0).view(2, 3).T, "part": torch.arange(9.0)[2:5],
         "parameter": torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float16))}
TIED = torch.randn(4, 2)
STATE |= {"tied": TIED, "tied_too": TIED}


def assert_same(path, state):
    found = read_bin(path)
    assert list(found) == list(state)
    for name, tensor in state.items():
        read = found[name].read(path)
        assert read.dtype == tensor.dtype, name
        assert torch.equal(read, tensor), name
        assert found[name].shape == tuple(tensor.shape)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.filterwarnings("ignore:.*protocol")
def test_every_protocol_is_read(tmp_path, protocol):
    path = tmp_path / "pytorch_model.bin"
    state = OrderedDict(STATE)
    state._metadata = OrderedDict({"": {"version": 1}})  # as in the state_dict() of a module
    torch.save(state, path, pickle_protocol=protocol)
    assert_same(path, STATE)


def test_the_published_writer(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    state = {name: STATE[name] for name in ("matrix", "half", "scalar", "part", "transposed")}
    incremental_save(state, path)
    with zipfile.ZipFile(path) as archive:
        description = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    assert description[:3] == b"\x80\x05\x95"  # protocol 5, a frame
    with pytest.raises(pickle.UnpicklingError, match="Unsupported operand 149"):
        torch.load(path, weights_only=True)
    assert_same(path, state)
    assert torch.equal(torch.load(path, weights_only=False)["matrix"], state["matrix"])


def archive_with(path, description, **records):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", description)
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)


SYSTEM = b"cposix\nsystem\n"
BY_STACK = b"\x80\x04\x8c\x05posix\x8c\x06system\x93"
EVIL = {  # a pickle for each opcode that can call something
    "GLOBAL, REDUCE": SYSTEM + b"(X\x04\0\0\0truetR.",
    "STACK_GLOBAL, REDUCE": BY_STACK + b"\x8c\x04true\x85R.",
    "INST": b"(X\x04\0\0\0trueiposix\nsystem\n.",
    "OBJ": b"(" + SYSTEM + b"X\x04\0\0\0trueo.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\nX\x04\0\0\0true\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\nX\x04\0\0\0true\x85}\x92.",
    "BUILD": b"cbuiltins\nexec\n}X\x01\0\0\0aX\x01\0\0\0bsb.",
    "EXT1": b"\x80\x02\x82\xf0(X\x04\0\0\0truetR.",
    "EXT2": b"\x80\x02\x83\xf0\0(X\x04\0\0\0truetR.",
    "EXT4": b"\x80\x02\x84\xf0\0\0\0(X\x04\0\0\0truetR.",
    "nested": b"\x80\x04cos.path\nos.system\n(X\x04\0\0\0truetR.",
    "of torch": b"ctorch.hub\nload\n(X\x04\0\0\0truetR.",
}
NAMES = {"NEWOBJ": "subprocess.Popen", "NEWOBJ_EX": "subprocess.Popen", "BUILD": "builtins.exec",
         "nested": "os.path.os.system", "of torch": "torch.hub.load"}


@pytest.mark.parametrize("opcodes", EVIL)
def test_whatever_could_be_called_is_refused_by_name(tmp_path, opcodes):
    path, called = tmp_path / "pytorch_model.bin", []
    archive_with(path, EVIL[opcodes])
    copyreg.add_extension("posix", "system", 0xf0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.system", called.append)
            with pytest.raises(UserError) as refused:
                read_bin(path)
    finally:
        copyreg.remove_extension("posix", "system", 0xf0)
    said = str(refused.value)
    assert said.startswith(f"{path} is refused: it holds '{NAMES.get(opcodes, 'posix.system')}', and a file of weights "
                           "needs none but collections.OrderedDict, ")
    assert "weights_only" not in said
    assert said.endswith("Use weights in safetensors files instead")
    assert not called


class Call:
    """Pickles as a call of an allowed function with any arguments, or as a change of an allowed object."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


MADE = torch._utils._rebuild_tensor_v2, torch._tensor._rebuild_from_type_v2, torch._utils._rebuild_parameter
UNFIT = {
    "no storage": Call(MADE[0], ("a", 0, (1,), (1,), False, OrderedDict())),
    "too few arguments": Call(MADE[0], ()),
    "another function": Call(MADE[1], (OrderedDict, torch.Tensor, (), {})),
    "another type": Call(MADE[1], (MADE[0], OrderedDict, (), {})),
    "no tensor": Call(MADE[2], ({}, False, OrderedDict())),
    "attributes of a function": Call(MADE[0], (), {"a": 1}),
    "a storage is called": Call(torch.FloatStorage, (3,)),
}


@pytest.mark.parametrize("case", UNFIT)
def test_allowed_functions_with_other_arguments(tmp_path, case):
    buffer = io.BytesIO()
    pickle.dump({"weight": UNFIT[case]}, buffer, protocol=4)
    archive_with(tmp_path / "pytorch_model.bin", buffer.getvalue())
    with pytest.raises(UserError, match="is truncated, damaged or not a file of weights"):
        read_bin(tmp_path / "pytorch_model.bin")


def test_allowed_functions_cannot_be_changed(tmp_path):
    """BUILD sets attributes of whatever lies on the stack."""
    for name in ("torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict", "torch Tensor"):
        module, function = name.split()
        for state in (b"}X\x08\0\0\0__call__Ns", b"N}X\x08\0\0\0__call__Ns\x86"):  # as attributes, as slots
            archive_with(tmp_path / "evil.bin", b"\x80\x02c%s\n%s\n%sb." % (module.encode(), function.encode(), state))
            with pytest.raises(UserError, match="damaged"):
                read_bin(tmp_path / "evil.bin")
    torch.save(STATE, tmp_path / "good.bin")
    assert_same(tmp_path / "good.bin", STATE)


def description(shape=(2,), strides=(1,), start=0, numel=2, key="0", kind=torch.FloatStorage, state=()):
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", kind, key, "cpu", numel) if isinstance(obj, bytes) else None

    buffer = io.BytesIO()
    tensor = Call(MADE[0], (b"", start, shape, strides, False, OrderedDict()), *state)
    Pickler(buffer, 4).dump({"weight": tensor})
    return buffer.getvalue()


@pytest.mark.parametrize("state", [[["a", -8, (2,), (1,)]], [{"start": -8}], [(None, {"start": -8})]], ids=str)
def test_a_tensor_cannot_be_changed_after_it_was_checked(tmp_path, state):
    archive_with(tmp_path / "evil.bin", description(state=state), **{"data/0": bytes(8)})
    with pytest.raises(UserError, match="the description changes an object"):
        read_bin(tmp_path / "evil.bin")


def test_a_storage_cannot_be_changed(tmp_path):
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", 2) if isinstance(obj, bytes) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(b"")
    archive_with(tmp_path / "evil.bin", buffer.getvalue()[:-1] + b"}X\x05\0\0\0numelK\x99sb.", **{"data/0": bytes(8)})
    with pytest.raises(UserError, match="the description changes an object"):
        read_bin(tmp_path / "evil.bin")


def test_attributes_of_the_state_dict_are_dropped(tmp_path):
    """torch.save writes _metadata. An attribute "items" would hide what the dictionary holds."""
    state = OrderedDict(STATE)
    state._metadata = OrderedDict(version=1)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(tmp_path / "pytorch_model.bin", STATE)
    evil = Call(OrderedDict, (), {"items": OrderedDict}, None, iter([("weight", 5)]))
    archive_with(tmp_path / "evil.bin", pickle.dumps(evil, 4))
    with pytest.raises(UserError, match="weight is int, expected a tensor"):
        read_bin(tmp_path / "evil.bin")


@pytest.mark.parametrize("opcode", [b"r\xff\xff\xff\x7f", b"p2147483647\n"])
def test_a_short_description_cannot_take_much_memory(tmp_path, opcode):
    """An object's number is an index into a table, which the unpickler makes as long."""
    archive_with(tmp_path / "evil.bin", b"\x80\x02}" + opcode + b".")
    with pytest.raises(UserError, match="the description numbers an object 2147483647"):
        read_bin(tmp_path / "evil.bin")


def test_a_long_record_is_not_read(tmp_path, monkeypatch):
    """Compressed, a small file may hold gigabytes."""
    archive_with(tmp_path / "evil.bin", description(), byteorder="little" + 99 * " ")
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match="its numbers are not little-endian"):
        read_bin(tmp_path / "evil.bin")


@pytest.mark.parametrize(("changed", "records", "said"), [
    ({"shape": (3,)}, {}, "more than its storage"), ({"start": 1}, {}, "more than its storage"),
    ({"strides": (2,)}, {}, "more than its storage"), ({"shape": (1 << 40,), "strides": (0,)}, {}, "more than its"),
    ({"shape": (1 << 61, 8), "strides": (0, 0)}, {}, "more than its storage"), ({"start": -1}, {}, "and numbers"),
    ({"shape": (0,)}, {}, "a tensor has no values"), ({"shape": (2.0,)}, {}, "and numbers"),
    ({"strides": ()}, {}, "and numbers"), ({"numel": 4}, {}, "of the storage '0' are compressed or missing"),
    ({"key": "1"}, {}, "data/1"), ({"key": 1}, {}, "a key and a number"), ({"numel": "2"}, {}, "a key and a number"),
    ({"kind": OrderedDict}, {}, "a key and a number"), ({}, {"byteorder": "big"}, "not little-endian")])
def test_a_description_that_does_not_fit_the_values(tmp_path, changed, records, said):
    path = tmp_path / "pytorch_model.bin"
    archive_with(path, description(), **{"data/0": struct.pack("<2f", 1, 2)})
    assert read_bin(path)["weight"].read(path).tolist() == [1, 2]
    archive_with(path, description(**changed), **{"data/0": struct.pack("<2f", 1, 2)} | records)
    with pytest.raises(UserError, match=said):
        read_bin(path)


def test_compressed_and_truncated_values(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", description())
        archive.writestr("archive/data/0", struct.pack("<2f", 1, 2))
    with pytest.raises(UserError, match="its description is compressed"):
        read_bin(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", description())
        archive.writestr("archive/data/0", struct.pack("<2f", 1, 2), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed or missing"):
        read_bin(path)
    torch.save(STATE, path)
    content = path.read_bytes()
    for size in (0, 10, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="is truncated, damaged or not a file of weights"):
            read_bin(path)


def test_files_without_an_archive_are_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="is not a zip archive, as torch.save writes it since torch 1.6: load and save"):
        read_bin(path)


def test_only_tensors_by_names(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for content, said in (([torch.ones(1)], "holds list, expected an object"), ({1: torch.ones(1)}, "from names to"),
                          ({"a": 1}, "a is int, expected a tensor"), (torch.ones(1), "holds BinTensor, expected")):
        torch.save(content, path)
        with pytest.raises(UserError, match=said):
            read_bin(path)
