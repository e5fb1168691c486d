"""Settings of the scripts: a frozen dataclass, overridden by TOML files, overridden by flags.

Every script declares its settings as a dataclass whose fields carry a default and a help text, and calls `run`. Unknown
keys, values of the wrong type and contradictions are reported together, in one line.
"""
import argparse
import dataclasses
import difflib
import os
import signal
import sys
import tomllib
import traceback
import typing
from pathlib import Path

from model.files import UserError

ROOT = Path(__file__).parent
CONFIGS = ROOT / "configs"


def setting(default, help, table=None):
    """A field of a settings dataclass: its default and what `--help` says about it.

    table: its value names a file in configs/<table> whose settings lie between the files and the flags.
    """
    return dataclasses.field(default=default, metadata={"help": help, "table": table})


def known(kind):
    """Names of the tasks or sizes that have a file in configs/: known("task") -> ["empd", …]."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.toml"))


def unknown_name(kind, name):
    """A list with the sentence that says that no task or size has this name; empty where one has it."""
    return [] if name in known(kind) else [f"unknown {kind} {name!r}, expected one of {', '.join(known(kind))}"]


def read_toml(path):
    """The tables of a TOML file, or a UserError that says where it is not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"the config file {path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None


def read_config(kind, name):
    """The tables of configs/<kind>/<name>.toml, for a known task or size."""
    if problem := unknown_name(kind, name):
        raise UserError(problem[0])
    return read_toml(CONFIGS / kind / f"{name}.toml")


def model_shape(size, depth=None):
    """The fields of ModelConfig that a size presets, with `depth` layers instead of its own if given."""
    if (shape := read_config("size", size).get("model")) is None:
        raise UserError(f"configs/size/{size}.toml says no shape of the model: it starts from published weights")
    return shape | ({} if depth is None else {"num_hidden_layers": depth})


ACCEPTED = {int: (int, str), float: (int, float, str), bool: (bool, str), str: (str,)}
METAVARS = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
PLURALS = {int: "whole numbers", float: "numbers", str: "words"}


def parts(kind):
    """(type, choices, whether None is allowed, whether it is a list) of a field: int, float, bool, str, a Literal of
    some, or a `tuple[int, ...]` and the like; each may be `| None`."""
    optional = type(None) in typing.get_args(kind)
    if optional:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0], (), optional, True
    choices = typing.get_args(kind)
    return type(choices[0]) if choices else kind, choices, optional, False


def convert(name, value, kind):
    """A value from a TOML file or a flag (a string) as a field's type; ValueError where it does not fit.

    "none" stands for None where that is allowed. A list is an array in TOML and "1,2,3" in a flag.
    """
    base, choices, optional, many = parts(kind)
    if optional and value == "none":
        return None
    if many:
        try:
            items = [item.strip() for item in value.split(",")] if isinstance(value, str) else value
            return tuple(convert(name, item, base) for item in items)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {value!r}, expected {PLURALS[base]} with commas between them") from None
    try:
        if type(value) not in ACCEPTED[base]:
            raise ValueError
        result = {"true": True, "false": False, True: True, False: False}[value] if base is bool else base(value)
        if choices and result not in choices:
            raise ValueError
    except (KeyError, ValueError):
        expected = "one of " + ", ".join(map(str, choices)) if choices else EXPECTED[base]
        raise ValueError(f"{name} is {value!r}, expected {expected}") from None
    return result


def overlay(values, given, where, fields, problems):
    """Puts the given values over the earlier ones; what is unknown or of the wrong type is added to `problems`."""
    for name, value in given.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            problems.append(f"unknown setting {name!r} in {where}{hint}")
            continue
        try:
            values[name] = convert(name, value, fields[name].type)
        except ValueError as error:
            problems.append(f"{error} (in {where})")


class Parser(argparse.ArgumentParser):
    """argparse with its own errors in our form: one line, no usage text."""

    def error(self, message):
        raise UserError(message)


def load(cls, argv, description, prog=None):
    """An instance of the settings dataclass `cls` from the command line.

    `--config FILE` may be given several times; later files win, and flags win over files. Where the class has a field
    `size`, the table [phase] of configs/size/<size>.toml lies between the files and the flags; `phase` is a field, too,
    or an attribute of the class. After it come the files that fields with a `table` name.
    The class may have a method `problems()` that returns what contradicts what, as sentences. Raises UserError.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    parser = Parser(prog, description=description, allow_abbrev=False, add_help=False,
                    argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--help", "-h", action="help", help="show this text")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="TOML file with settings")
    for name, field in fields.items():
        base, choices, _, many = parts(field.type)
        default = ",".join(map(str, field.default)) if many and field.default else field.default
        help = field.metadata["help"] + (f" (default: {default})" if default is not None else "")
        kind = {"nargs": "?", "const": "true"} if base is bool else {}
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else METAVARS[base] + ",…" * many
        parser.add_argument(f"--{name}", metavar=metavar, help=help.replace("%", "%%"), **kind)
    flags, rest = parser.parse_known_args(argv)
    flags = vars(flags)
    values, problems = {}, [f"unknown flag {word!r}" for word in rest if word.startswith("-")]
    problems += [f"{word!r} belongs to no flag" for word in rest if not word.startswith("-")] if not problems else []
    for path in flags.pop("config"):
        overlay(values, read_toml(path), path, fields, problems)
    given = {}
    overlay(given, flags, "the flags", fields, problems)
    size, phase = ({**values, **given}.get(name, getattr(cls, name, None)) for name in ("size", "phase"))
    if "size" in fields and size is not None:
        if problem := unknown_name("size", size):
            problems += problem
        elif phase is not None:
            tables = read_config("size", size)
            if phase in tables:
                overlay(values, tables[phase], f"configs/size/{size}.toml [{phase}]", fields, problems)
            else:
                problems.append(f"the size {size} has no recipe [{phase}] in configs/size/{size}.toml")
    for field in (field for field in fields.values() if field.metadata["table"]):
        table, name = field.metadata["table"], {**values, **given}.get(field.name)
        if name is not None and not unknown_name(table, name):  # what is unknown is for the class to say
            overlay(values, read_config(table, name), f"configs/{table}/{name}.toml", fields, problems)
    values |= given
    if not problems and hasattr(cls, "problems"):
        problems = cls(**values).problems()
    if problems:
        raise UserError("; ".join(problems))
    return cls(**values)


def run(commands, description):
    """Runs a script, as `dispatch` does, and ends the process.

    When a script returns, everything it has to write is written. What is left of the process is not taken apart: a
    thread of a library that is still at work then (gloo's, with the last collective's tensors; pyarrow's, apache/arrow
    issue 45214) aborts it now and then, and a finished run would count as failed.
    """
    status = 0
    try:
        dispatch(commands, description)
    except SystemExit as leaving:
        status = leaving.code or 0
    except BrokenPipeError:  # whoever read what is printed has seen enough, such as `head`
        os._exit(128 + signal.SIGPIPE)
    except Exception as error:  # a mistake of ours
        traceback.print_exc()
        print(f"error on rank {os.environ.get('RANK', 0)}: {type(error).__name__}: {error}", file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def dispatch(commands, description):
    """Parses the settings, calls the script's function, and turns a UserError into one line and status 2.

    commands: a pair (settings dataclass, function), or a mapping from the script's sub-commands to such pairs.
    With DEBUG=1 in the environment the traceback is shown as well.
    """
    argv, prog = sys.argv[1:], Path(sys.argv[0]).name
    try:
        if isinstance(commands, dict):
            if not argv or argv[0] not in commands:
                asked = argv and argv[0] in ("-h", "--help")
                print(f"{description}\ncommands: {', '.join(commands)}; `{prog} COMMAND --help` lists the settings",
                      file=sys.stdout if asked else sys.stderr)
                sys.exit(0 if asked else 2)
            prog, (cls, function), argv = f"{prog} {argv[0]}", commands[argv[0]], argv[1:]
        else:
            cls, function = commands
        loaded = None
        loaded = load(cls, argv, description, prog)
        function(loaded)
    except UserError as error:
        if os.environ.get("DEBUG") == "1":
            raise
        rank = int(os.environ.get("RANK", 0))
        if not rank:
            print(f"error: {error}", file=sys.stderr)
        elif loaded is not None:  # wrong flags are the same on every rank, what comes later need not be
            print(f"error on rank {rank}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
