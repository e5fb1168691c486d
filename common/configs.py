"""The TOML files in configs/: sizes, tasks, methods and others, each found by its name."""
import tomllib
from collections.abc import Iterable
from pathlib import Path

from common.files import UserError, first_line, read_text

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"


def below_root(path: str | Path) -> str:
    """A path in the project's folder, relative to it; any other word or path unchanged. Records hold this form, so that
    they stay valid when the project is moved."""
    return str(path).removeprefix(f"{ROOT}/")


def known(kind: str) -> list[str]:
    """Names of the TOML files in configs/<kind>: known("task") -> ["empd", …]."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.toml"))


def unknown_name(kind: str, name: str, names: Iterable[str] | None = None) -> list[str]:
    """A list with the sentence that rejects an unknown name; empty if the name is known."""
    accepted = known(kind) if names is None else names
    return [] if name in accepted else [f"unknown {kind} {name!r}, expected one of {', '.join(accepted)}"]


def read_toml(path: str | Path) -> dict:
    """The tables of a TOML file. Raises UserError if it does not exist or is not TOML."""
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{path} is not TOML that can be read: it is nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        raise UserError(f"{path} is not TOML: {first_line(error)}") from None


def read_config(kind: str, name: str) -> dict:
    """The tables of configs/<kind>/<name>.toml."""
    if problem := unknown_name(kind, name):
        raise UserError(problem[0])
    return read_toml(CONFIGS / kind / f"{name}.toml")


def model_shape(size: str, depth: int | None = None) -> dict:
    """The fields of ModelConfig that a size preset gives, with `depth` layers instead of its own if given."""
    if (shape := read_config("size", size).get("model")) is None:
        raise UserError(f"configs/size/{size}.toml gives no model shape: this size starts from published weights")
    return shape | ({} if depth is None else {"num_hidden_layers": depth})
