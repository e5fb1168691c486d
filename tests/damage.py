"""Hypothesis strategies that damage the content of valid files.

A strategy `damaged_<format>(content)` gives pairs (description, damaged content). The damaged content is bytes, None
for a missing file, or one of INSTEAD, which stands in the file's place.
"""
import io
import json
import pickle
import struct
import tomllib
import zipfile

import numpy as np
import pyarrow
import torch
from hypothesis import strategies as st
from pyarrow import parquet

INSTEAD = "folder", "dangling symlink", "symlink to itself"

# What replaces a value. Most are valid JSON; NaN, infinities and lone surrogates are not.
LITERALS = [
    "null", "true", "false", "0", "-1", "1", "3", "5000", "2.5", "0.0", "-0.0", "1e-320", "1e308", "-1e308", "1e999",
    "NaN", "Infinity", "-Infinity", "2147483648", "4294967296", "1000000000000", "9223372036854775808",
    "1" + "0" * 30, "1" + "0" * 400, "9" * 5000,
    '""', '" "', '"0"', '"1"', '"x"', '"nan"', '"\\u0000"', '"\\ud800"', '"é\\n|東"', '"../../x"', '"/"', '"."',
    '"{{ x"', '"' + "x" * 300 + '"', '"' + "word " * 20_000 + '"',
    "[]", "{}", "[[]]", "[{}]", "[null]", "[0]", "[-1]", '["x"]', "[1, 2, 3]", '{"a": 1}', '{"": null}',
    '{"content": 3}', "[" * 50 + "]" * 50, "[" * 100_000 + "]" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000]
NAMES = ["", "x", "0", "\0", "é|\n", "../x", "x" * 300, "__class__", "name", "type", "file", "self"]
PIECES = [b"\0", b"\xff", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b'"', b"{", b"]", b",", b" ",
          b"\xe2\x80\xa8", b"\x1b[2J", b"-", b"9"]
WHOLE = [b"", b"\n", b" ", b"null", b"\0" * 100, b"{}", b"[]", b"\x80\x05", b"PK\x03\x04"]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
any_value = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3)
                         | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=4)


class Literal(str):
    """A value that is written as this text."""


class Object(list):
    """A JSON object: a list of [name, value], in which a name may come twice."""


def parse(value):
    """A value with Objects in place of dictionaries."""
    if isinstance(value, dict):
        return Object([name, parse(item)] for name, item in value.items())
    return [parse(item) for item in value] if isinstance(value, list) else value


def dump(value, equals=": "):
    """A value as JSON or, with equals=" = ", as an inline value of TOML."""
    if isinstance(value, Literal):
        return str(value)
    if isinstance(value, Object):
        return "{" + ", ".join(json.dumps(name, ensure_ascii=False) + equals + dump(item, equals)
                               for name, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(dump(item, equals) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def dump_toml(value):
    """An Object as a TOML file."""
    if not isinstance(value, Object):
        return dump(value)
    lines = [f"{json.dumps(name)} = {dump(item, ' = ')}\n" for name, item in value]
    return "".join(lines).replace("NaN", "nan").replace("Infinity", "inf")


def encode(text):
    """UTF-8, with lone surrogates as they are."""
    return text.encode("utf-8", "surrogatepass")


def saved(write):
    """The bytes that a function writes to a file."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def other_types(value):
    """About the same value with other types."""
    if isinstance(value, bool):
        return [int(value), str(value).lower(), [value]]
    if isinstance(value, int | float):
        return [str(value), float(value), int(value), bool(value), -value, value + 1, 1000 * value, value / 2, [value]]
    if isinstance(value, str):
        return [[value], list(value), Object([["content", value]]), 100 * value, value[:len(value) // 2], value + "\0"]
    if isinstance(value, Object):
        return [[item for _, item in value], [[*pair] for pair in value], dump(value), [value], Object([["x", value]])]
    if isinstance(value, list):
        return [Object([str(index), item] for index, item in enumerate(value)), dump(value), [value], value[::-1],
                value[:len(value) // 2], 2 * value, 100 * value if len(value) < 100 else []]
    return ["null", 0, []]


@st.composite
def places(draw, tree):
    """A place in a tree: (its path, the list that holds it, its index there). The list is None for an empty tree."""
    path, holder, index = "$", None, 0
    while isinstance(tree, list) and tree and (holder is None or draw(st.integers(0, 3))):
        holder, index = tree, draw(st.integers(0, len(tree) - 1))
        name, tree = holder[index] if isinstance(holder, Object) else (index, holder[index])
        path += f".{name}"
    return path, holder, index


@st.composite
def changed(draw, tree):
    """(description, tree) after one change."""
    path, holder, index = draw(places(tree))
    how = draw(st.sampled_from(["literal"] * 5 + ["type"] * 3 + ["any", "other", "drop", "rename", "twice", "whole"]))
    if holder is None or how == "whole":
        tree = Literal(draw(st.sampled_from(LITERALS)))
        return f"all is {tree:.40}", tree
    named = isinstance(holder, Object)
    value = holder[index][1] if named else holder[index]
    if how == "rename" and named:
        holder[index][0] = new = draw(st.sampled_from([*NAMES, *(name for name, _ in holder)]))
    elif how in ("drop", "rename", "twice"):
        times = 0 if how == "drop" else draw(st.sampled_from([2, 100]))
        new, copy = times, Literal(dump(value))
        holder[index:index + 1] = [[holder[index][0], copy] if named else copy for _ in range(times)]
    else:
        if how == "literal":
            new = Literal(draw(st.sampled_from(LITERALS)))
        elif how == "type":
            new = draw(st.sampled_from(other_types(value)))
        elif how == "any":
            new = parse(draw(any_value))
        else:  # the value of another place
            _, other, place = draw(places(tree))
            new = Literal(dump(other[place][1] if isinstance(other, Object) else other[place]))
        if named:
            holder[index][1] = new
        else:
            holder[index] = new
    return f"{path:.200}: {how} {dump(new):.60}", tree


@st.composite
def damaged_tree(draw, value):
    """(description, tree) of a value with one or two changes."""
    descriptions, tree = [], parse(value)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        description, tree = draw(changed(tree))
        descriptions.append(description)
    return "; ".join(descriptions), tree


@st.composite
def damaged_bytes(draw, content):
    """Damages of a file of any format: some bytes changed."""
    how = draw(st.sampled_from(["cut", "flip", "insert", "remove", "repeat", "replace", "whole", "recode"]))
    place, length = draw(st.integers(0, max(0, len(content) - 1))), draw(st.sampled_from([1, 1, 2, 8, 100]))
    piece, bit = draw(st.sampled_from(PIECES)) * length, draw(st.integers(0, 7))
    before, after = content[:place], content[place:]
    recoded = [b"\xef\xbb\xbf" + content, content[::-1], content * 2, content.replace(b"\n", b"\r"),
               content.decode("latin-1").encode("utf-16")]
    return f"{how} at byte {place}, {length} bytes {piece[:8]!r}, bit {bit}", {
        "cut": before, "flip": before + bytes(byte ^ 1 << bit for byte in after[:1]) + after[1:],
        "insert": before + piece + after, "remove": before + after[length:],
        "repeat": before + 20 * after[:length] + after[length:], "replace": before + piece + after[len(piece):],
        "whole": WHOLE[place % len(WHOLE)], "recode": recoded[place % len(recoded)]}[how]


def mostly(strategy, content):
    """Damages of a format, some of the bytes, and sometimes another thing or nothing in place of the file."""
    instead = st.sampled_from([("missing", None), *((what, what) for what in INSTEAD)])
    return st.integers(0, 19).flatmap(
        lambda number: instead if number == 19 else damaged_bytes(content) if number > 15 else strategy)


def damaged_json(content):
    """Damages of a JSON file."""
    return mostly(damaged_tree(json.loads(content)).map(lambda found: (found[0], encode(dump(found[1])))), content)


def damaged_toml(content):
    """Damages of a TOML file."""
    return mostly(damaged_tree(tomllib.loads(content.decode())).map(
        lambda found: (found[0], encode(dump_toml(found[1])))), content)


@st.composite
def damaged_line(draw, content):
    """A JSONL file with one damaged, missing or repeated line."""
    lines = content.decode().splitlines()
    index = draw(st.integers(0, len(lines) - 1))
    times = draw(st.sampled_from([1, 1, 1, 1, 0, 2]))
    description, tree = draw(damaged_tree(json.loads(lines[index]))) if times == 1 else (f"{times} times", "")
    lines[index:index + 1] = times * [dump(tree) if times == 1 else lines[index]]
    return f"line {index + 1}: {description}", encode("\n".join([*lines, ""]))


def damaged_jsonl(content):
    """Damages of a JSONL file."""
    return mostly(damaged_line(content), content)


def damaged_safetensors(content):
    """Damages of a safetensors file: its header, the header's length, values, all dtypes."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8:start]), content[start:]

    def pack(found):
        text = encode(dump(found[1]))
        return found[0], struct.pack("<Q", len(text)) + text + data

    tree = damaged_tree(header).map(pack)
    length = st.sampled_from([0, 1, start - 9, start - 7, len(content), 1 << 31, 1 << 40, (1 << 64) - 1]).map(
        lambda number: (f"header length {number}", struct.pack("<Q", number) + content[8:]))
    value = st.tuples(st.integers(0, len(data) // 4 - 1), st.sampled_from(["nan", "inf", "-inf", "3e38", "1e-40"])).map(
        lambda found: (f"value {found[0]} is {found[1]}", content[:start] + data[:4 * found[0]]
                       + struct.pack("<f", float(found[1])) + data[4 * found[0] + 4:]))
    dtype = st.sampled_from(["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "x"]).map(
        lambda name: (f"dtype {name}", pack(("", parse(
            {key: entry | {"dtype": name} for key, entry in header.items() if "dtype" in entry})))[1]))
    return mostly(tree | tree | length | value | dtype, content)


def damaged_npy(content):
    """Damages of an array file: its header, or its values."""
    array = np.load(io.BytesIO(content))
    size = len(array)

    def pack(found):
        dtype, shape, order, version = found
        header = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
        header += b" " * (-(len(header) + 11) % 64) + b"\n"
        start = b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(header))
        return str(found), start + header + array.tobytes()

    header = st.tuples(
        st.sampled_from(["'<u2'"] * 4 + ["'>u2'", "'<u4'", "'<i8'", "'|i1'", "'<f4'", "'<c8'", "'|O'", "'<U1'", "'|b1'",
                                        "'<M8[s]'", "[('a', '<u2')]", "'x'", "None", "3"]),
        st.sampled_from([f"({size},)"] * 4 + [
            f"({size}, 1)", f"(1, {size})", f"({size // 2}, 2)", "()", "(0,)", "(1,)", "(10**12,)", "(1000000000000,)",
            "(-1,)", "None", "(2.5,)", f"({size - 1},)", f"({size + 1},)"]),
        st.sampled_from(["False", "False", "True", "3"]), st.sampled_from([1, 1, 1, 0, 2, 3, 9])).map(pack)
    values = st.sampled_from([
        array[:0], array[:3], array[:, None], np.stack([array, array]), array.astype(float), array.astype(np.int64) - 5,
        array.astype(bool), array + 600, np.full_like(array, 65535), array * np.float32("nan"), array.astype(str),
        array.astype(np.uint64) << 40, np.array(7), array[::-1], np.array({"a": 1}, dtype=object)]).map(
        lambda other: (f"{other.dtype} {other.shape}", saved(lambda file: np.save(file, other))))
    return mostly(header | values, content)


def damaged_parquet(content):
    """Damages of a parquet file: its rows."""
    rows = parquet.read_table(io.BytesIO(content)).to_pylist()

    def pack(found):
        def write(file):
            parquet.write_table(pyarrow.Table.from_pylist(json.loads(dump(found[1]))), file)

        return found[0], attempt(write)

    return mostly(damaged_tree(rows).map(pack), content)


class Unknown:
    """A class that weights do not need."""


def other_states(state):
    """{description: an object in place of the weights `state`}."""
    name, first = next(iter(state.items()))
    parts = {
        "None": None, "text": "x", "a number": 3, "an integer tensor": first.long(), "fp64": first.double(),
        "bf16": first.bfloat16(), "complex": first.to(torch.complex64), "bool": first > 0, "sparse": first.to_sparse(),
        "meta": first.to("meta"), "expanded": first[0, 0].expand(10 ** 13), "scalar": first.sum(), "empty": first[:0],
        "expanded twice": first[0, 0].expand(10 ** 6, 10 ** 6), "transposed": first.T, "NaN": first * torch.nan,
        "conjugate": (first * 1j).conj(), "a list": [first, [first]], "a dict": {}}
    names = {"a path": "../x", "no name": "", "NUL": "\0", "a tuple": (1, 2), "bytes": b"x", "a number": 3,
             "a surrogate": "\ud800", "long text": "x" * 100_000, "a buffer": "model.rotary_emb.inv_freq", "None": None}
    return {
        **{f"{what} in it": state | {name: part} for what, part in parts.items()},
        **{f"{what} as a name": state | {key: first} for what, key in names.items()},
        **{f"all {what}": dict.fromkeys(state, part) for what, part in parts.items()},
        "a tensor": first, "a list": list(state.values()), "pairs": list(state.items()), "None": None, "text": "x",
        "a module": torch.nn.Linear(2, 2), "numbers as names": dict(enumerate(state.values())), "a set": set(state),
        "nested": {"model": state}, "nothing": {}, "one missing": {key: state[key] for key in state if key != name},
        "parameters": {key: torch.nn.Parameter(value) for key, value in state.items()}, "a function": {"x": print},
        "arrays": {key: value.numpy() for key, value in state.items()}, "unknown class": state | {"x": Unknown()}}


def attempt(write):
    """The bytes that a function writes to a file; none if the object cannot be written."""
    try:
        return saved(write)
    except Exception:
        return b""


@st.composite
def damaged_zip(draw, content):
    """A zip file with one damaged, missing or additional member."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw(st.sampled_from(sorted(members)))
    how = draw(st.sampled_from(["damaged", "damaged", "missing", "renamed", "more"]))
    compression = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    description, damaged = draw(damaged_bytes(members[name]))
    if how in ("missing", "renamed"):
        members.pop(name)
    members |= {"damaged": {name: damaged}, "renamed": {"x" + name: b"x"}, "more": {"x/../../y": b"x"}}.get(how, {})

    def write(file):
        with zipfile.ZipFile(file, "w", compression) as archive:
            for member, data in members.items():
                archive.writestr(member, data)

    return f"{name}: {how}, {description}", saved(write)


def damaged_bin(content):
    """Damages of a file of torch.save: other objects and formats, and damages of the zip file."""
    states = other_states(torch.load(io.BytesIO(content), weights_only=True))
    state = st.tuples(st.sampled_from(sorted(states)), st.sampled_from([2, 3, 4, 5]), st.booleans()).map(
        lambda found: (f"{found[0]}, protocol {found[1]}, zip {found[2]}", attempt(lambda file: torch.save(
            states[found[0]], file, pickle_protocol=found[1], _use_new_zipfile_serialization=found[2]))))
    plain = st.sampled_from(sorted(states)).map(
        lambda found: (f"plain pickle, {found}", attempt(lambda file: pickle.dump(states[found], file))))
    return mostly(state | state | state | plain | damaged_zip(content), content)
