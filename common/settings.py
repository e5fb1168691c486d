"""Settings of the scripts: a frozen dataclass, overridden by TOML files, overridden by flags.

Every script declares its settings as a dataclass whose fields are made by `setting`; `load` makes an instance of it.
Unknown names, wrong types and values out of range are reported together, in one line; missing values and contradictions
follow once names and types are right.
`--show_settings` prints every resolved value and where it comes from.
"""
import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from common.configs import known, read_config, read_toml, unknown_name
from common.files import UserError


def setting(default: Any, help: str, *, required: bool = False, names: str | Collection[str] | None = None,
            overlay: bool = False, replaced_by: Collection[str] = (),
            used_if: tuple[str, Collection[Any]] | None = None, **bounds: float) -> Any:
    """A field of a settings dataclass.

    Args:
        default: the default value; None also means "not set".
        help: what `--help` says about the setting.
        required: the setting must be given.
        names: the accepted names, or the folder in configs/ whose TOML files are the accepted names.
        overlay: the settings in the named TOML file override those of earlier files; of `size` a table, see `load`.
        replaced_by: settings that take the place of this one if they are set; its flag is refused if a file sets one.
        used_if: another setting and its values with which this one is used; its flag is refused with other values.
        bounds: `at_least`, `above`, `at_most` and `below`, for a number or each number in a list.
    """
    assert bounds.keys() <= {"at_least", "above", "at_most", "below"}, bounds
    return dataclasses.field(default=default, metadata={"help": help, "required": required, "bounds": bounds,
                                                        "names": names, "overlay": overlay,
                                                        "replaced_by": replaced_by, "used_if": used_if})


# The types a field may have: what TOML and flags may give for them, and how messages and `--help` call them.
ACCEPTED: dict[type, tuple[type, ...]] = {int: (int, str), float: (int, float, str), bool: (bool, str), str: (str,)}
METAVARS = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "UTF-8 text without null bytes"}
MAX_INT = 2 ** 63  # beyond it torch and numpy take no seeds and sizes
PLURALS = {int: "whole numbers", float: "numbers", str: "words"}


def parts(kind: Any) -> tuple[type, tuple, bool, bool]:
    """(type, choices, whether None is allowed, whether it is a list) of a field's type.

    A field is an int, float, bool, str, a Literal, or a tuple such as `tuple[int, ...]`, each optionally `| None`.
    """
    optional = type(None) in typing.get_args(kind)
    if optional:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0], (), optional, True
    choices = typing.get_args(kind)
    return type(choices[0]) if choices else kind, choices, optional, False


def is_plain(text: str) -> bool:
    """Whether a text can be part of a path and printed: no null bytes, and no bytes that were not UTF-8."""
    return "\0" not in text and not re.search("[\ud800-\udfff]", text)


def convert(name: str, value: Any, kind: Any) -> Any:
    """A value from a TOML file or a flag (a string) as a field's type. Raises ValueError if it does not fit.

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
            raise ValueError(f"{name} is {value!r:.80}, expected {PLURALS[base]} separated by commas") from None
    try:
        if type(value) not in ACCEPTED[base] or base is str and not is_plain(value):
            raise ValueError
        result = {"true": True, "false": False, True: True, False: False}[value] if base is bool else base(value)
        if choices and result not in choices:
            raise ValueError
    except (KeyError, OverflowError, ValueError):
        expected = "one of " + ", ".join(map(str, choices)) if choices else EXPECTED[base]
        raise ValueError(f"{name} is {value!r:.80}, expected {expected}") from None
    return result


# What other tools call settings of this program.
SYNONYMS = {"lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs",
            "batch_size": "global_batch_size", "train_batch_size": "global_batch_size",
            "per_device_train_batch_size": "global_batch_size", "gradient_accumulation_steps": "global_batch_size",
            "output_dir": "out", "model": "init", "model_name_or_path": "init", "scheduler": "lr_scheduler_type",
            "warmup": "warmup_steps", "warmup_ratio": "warmup_steps", "grad_clip": "max_grad_norm", "bf16": "dtype",
            "fp16": "dtype", "lora_r": "lora_rank", "block_size": "seq_length", "max_length": "max_source_length"}


def hint(name: str, known_names: Iterable[str]) -> str:
    """A suggestion of the known name that may have been meant, as words in parentheses, or ""."""
    word, names = name.lstrip("-"), list(known_names)
    dashes = name.removesuffix(word)
    close = [dashes + SYNONYMS[word]] if word in SYNONYMS else []
    close = [found for found in close if found in names] or difflib.get_close_matches(name, names, 1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Resolved:
    """The values of settings, where each comes from, and all problems found."""

    def __init__(self, cls: type):
        self.fields = {field.name: field for field in dataclasses.fields(cls)}
        self.fixed: frozenset[str] = frozenset()  # names whose values are not overridden any more
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[str] = []

    def update(self, given: Mapping[str, Any], where: str) -> None:
        """Overrides values that are not fixed; unknown names and wrong types become problems.

        "none" also stands for the empty list where that is the default, and for a required setting that is missing.
        """
        for name, value in given.items():
            if name not in self.fields:
                self.problems.append(f"unknown setting {name!r} in {where}{hint(name, self.fields)}")
                continue
            field = self.fields[name]
            try:
                is_required = field.metadata.get("required", False)
                if value == "none" and (is_required or field.default == ()):
                    converted = None if is_required else ()
                else:
                    converted = convert(name, value, field.type)
            except ValueError as error:
                self.problems.append(f"{error} (in {where})")
                continue
            if name not in self.fixed:
                self.values[name], self.origins[name] = converted, where

    def without_effect(self) -> list[str]:
        """Sentences on the flags that a setting in a file replaces, and on those that another setting makes useless."""
        found = []
        for name in sorted(self.fixed):
            meta = self.fields[name].metadata
            found += [f"{name} would change nothing, since {other} is {self.values[other]} ({self.origins[other]}): "
                      f"leave it out, or give --{other} none" for other in meta["replaced_by"]
                      if other not in self.fixed and self.values.get(other) is not None]
            if meta["used_if"]:
                other, values = meta["used_if"]
                value = self.values.get(other, self.fields[other].default)
                if value not in values:
                    found.append(f"{name} would change nothing, since {other} is {value or 'not set'} "
                                 f"({self.origins.get(other, 'default')}): leave it out")
        return found

    def show(self, cfg: Any) -> None:
        """Prints every setting with its value and origin."""
        width = max(map(len, self.fields))
        for name in self.fields:
            value = getattr(cfg, name)
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            print(f"{name:<{width}}  {text:<24}  {self.origins.get(name, 'default')}")


def json_values(cfg: Any) -> dict[str, Any]:
    """The values of a settings object as JSON holds them: with lists in place of tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(cfg).items()}


def non_defaults(cfg: Any, *names: str) -> list[str]:
    """The names, among those given, of the settings that differ from their defaults."""
    return [name for name in names if getattr(cfg, name) != getattr(type(cfg), name)]


def check_values(cfg: Any, is_complete: bool = True) -> list[str]:
    """Checks the values of a settings object against the metadata of its fields; returns problems as sentences.
    is_complete: False if a given value was rejected: missing values are then not reported."""
    found = []
    for field in dataclasses.fields(cfg):
        value, meta = getattr(cfg, field.name), field.metadata
        if meta["required"] and not value and is_complete:
            found.append(f"--{field.name} is missing")
        for item in value if isinstance(value, tuple) else () if value is None else (value,):
            if isinstance(item, int | float) and not isinstance(item, bool):
                found += out_of_bounds(field.name, item, meta["bounds"])
            if isinstance(meta["names"], str):
                found += unknown_name(meta["names"], item)
            elif meta["names"] is not None:
                found += unknown_name(field.name, item, meta["names"])
    return list(dict.fromkeys(found))


def out_of_bounds(name: str, value: float, bounds: Mapping[str, float]) -> list[str]:
    """A list with the sentence that rejects a number; empty if it is within the bounds."""
    low, above, high, below = (bounds.get(key) for key in ("at_least", "above", "at_most", "below"))
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{name} is {value}, expected a finite number"]
    if isinstance(value, int) and abs(value) >= MAX_INT:
        return [f"{name} is {value!s:.80}, expected a whole number below 2**63"]
    if (low is None or value >= low) and (above is None or value > above) and \
            (high is None or value <= high) and (below is None or value < below):
        return []
    if low is not None and high is not None:
        return [f"{name} is {value}, expected a number from {low} to {high}"]
    limits = (("at least", low), ("above", above), ("at most", high), ("below", below))
    expected = " and ".join(f"{words} {limit}" for words, limit in limits if limit is not None)
    number = "" if expected == f"at least {low}" else "a number "
    return [f"{name} is {value}, expected {number}{expected}"]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        if found := re.fullmatch("argument (--[^:]*): expected one argument", message):
            raise UserError(f"{found[1]} has no value: give one behind it; one that begins with - as {found[1]}=-…")
        raise UserError(message)


def make_parser(cls: type, description: str, prog: str | None) -> Parser:
    """A parser with a flag for each field of a settings dataclass, `--config` and `--show_settings`."""
    parser = Parser(prog, description=description, allow_abbrev=False, add_help=False,
                    argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--help", "-h", action="help", help="show this text")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="TOML file with settings")
    parser.add_argument("--show_settings", action="store_true", default=False,
                        help="print every setting, its value and where it comes from, and exit")
    for field in dataclasses.fields(cls):
        base, choices, _, many = parts(field.type)
        default: Any = field.default
        default = ",".join(map(str, default)) if many and default else default
        help = field.metadata["help"] + (f" (default: {default})" if default not in (None, (), "") else "")
        kind: dict[str, Any] = {"nargs": "?", "const": "true"} if base is bool else {}
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else METAVARS[base] + ",…" * many
        parser.add_argument(f"--{field.name}", metavar=metavar, help=help.replace("%", "%%"), **kind)
    return parser


def config_files(argv: Sequence[str]) -> list[str]:
    """The files that `--config` names in a command line."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    return parser.parse_known_args(argv)[0].config


def apply_size(found: Resolved, size: str, phase: str | None) -> None:
    """Checks the name of a size and, if the field `size` is an overlay, updates the settings from its table [phase]."""
    if unknown_size := unknown_name("size", size):
        found.problems += unknown_size
    elif found.fields["size"].metadata["overlay"] and phase is not None:
        tables = read_config("size", size)
        if phase in tables:
            found.update(tables[phase], f"configs/size/{size}.toml [{phase}]")
        else:
            found.problems.append(f"the size {size} has no table [{phase}] in configs/size/{size}.toml")


def apply_overlays(found: Resolved) -> None:
    """Updates the settings from the files in configs/ that the fields with `overlay` apart from `size` name."""
    for name, field in found.fields.items():
        kind, preset = field.metadata["names"], found.values.get(name)
        if field.metadata["overlay"] and name != "size" and preset in known(kind):
            found.update(read_config(kind, preset), f"configs/{kind}/{preset}.toml")


def load(cls: type, argv: Iterable[str], description: str = "", prog: str | None = None) -> Any:
    """An instance of the settings dataclass `cls` from the command line. Raises UserError with all problems of names,
    types and ranges, or, if names and types are right, of ranges, missing values and contradictions.

    `--config FILE` may be given several times; later files override earlier ones, and flags override files. If the
    class has a field `size` with `overlay`, the table [phase] of configs/size/<size>.toml comes between files and
    flags, where `phase` is a field or an attribute of the class. After it come the files of other fields with
    `overlay`. The class may have a method `problems()` that returns contradictions between settings, as sentences.
    """
    found = Resolved(cls)
    given, rest = make_parser(cls, description, prog).parse_known_args(argv)
    flags = vars(given)
    unknown = [f"unknown flag {word!r}{hint(word.partition('=')[0], [f'--{name}' for name in found.fields])}"
               for word in rest if word.startswith("-")]
    found.problems += unknown or [f"unexpected argument {word!r}" for word in rest]
    files, show = flags.pop("config"), flags.pop("show_settings")
    found.update(flags, "the flags")
    found.fixed = frozenset(found.values)
    for path in files:
        found.update(read_toml(path), path)
    size, phase = (found.values.get(name, getattr(cls, name, None)) for name in ("size", "phase"))
    if "size" in found.fields and size is not None:
        apply_size(found, size, phase)
    apply_overlays(found)
    cfg = cls(**found.values)
    problems = [*found.problems, *check_values(cfg, not found.problems)]
    if not found.problems:
        problems += found.without_effect() + (cfg.problems() if hasattr(cfg, "problems") else [])
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    if show:
        if os.environ.get("RANK", "0") == "0":
            found.show(cfg)
        sys.exit(0)
    return cfg
