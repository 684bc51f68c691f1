"""Settings from YAML files, command lines and checkpoints, through jsonargparse; what is wrong is one line."""

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from hadamax.errors import nearest
from train.config import Config, UsageError

T = TypeVar("T")


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration of nested plain values, as YAML files and checkpoints hold them."""
    try:
        return _build(Config, _parser(Config, "train.finetune").parse_object(dict(values)))
    except ArgumentError as error:
        raise UsageError(_one_line(str(error.message), Config)) from error


def parse(cls: type[T], argv: Sequence[str] | None, prog: str) -> T:
    """`cls` from a command line: `--config file.yaml` (repeatable) and `--section.key value`.

    Raises:
        UsageError: an unknown option, type or value, in one line with the nearest names.
    """
    argv = sys.argv[1:] if argv is None else argv
    _refuse_values_of_groups(argv, cls)
    try:
        return _build(cls, _parser(cls, prog).parse_args(_spelled_out(argv, cls)))
    except ArgumentError as error:
        raise UsageError(_one_line(str(error.message), cls)) from error


def _spelled_out(argv: Sequence[str], cls: type) -> list[str]:
    """`--verify` as `--verify true`, and `--as` as `--as_`: a Python field cannot be called `as`."""
    switches = {"--" + name for name, kind in _options(cls) if kind is bool}
    spelled = []
    for arg, following in itertools.pairwise([*argv, "--"]):
        spelled.append(re.sub(r"^--as(?==|$)", "--as_", arg))
        if arg in switches and following.startswith("--"):
            spelled.append("true")
    return spelled


def _refuse_values_of_groups(argv: Sequence[str], cls: type) -> None:
    """`--data FILE`: jsonargparse takes settings there, or a file of them, and says little of anything else."""
    options = [name for name, _ in _options(cls)]
    for arg, following in itertools.pairwise([*argv, "--"]):
        name, _, given = arg.partition("=")
        value = given or following
        own = [option for option in options if option.startswith(f"{name[2:]}.")]
        if name.startswith("--") and own and not value.startswith("--") and not _is_settings(value):
            raise UsageError(f"{name} is a group of options, found {value!r}; say which: --{', --'.join(own)}")


def _is_settings(value: str) -> bool:
    """A mapping in YAML, or a file that holds one."""
    try:
        text = Path(value).read_text(encoding="utf-8") if Path(value).is_file() else value
        return isinstance(yaml.safe_load(text), dict)
    except (OSError, ValueError, yaml.YAMLError):
        return False


def _parser(cls: type, prog: str) -> ArgumentParser:
    description = (cls.__doc__ or "").split("\n")[0]
    parser = ArgumentParser(prog=f"python -m {prog}", description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with the options below; later options override it")
    parser.add_class_arguments(cls, nested_key=None)
    return parser


def _build(cls: type[T], values: Namespace | Mapping[str, Any]) -> T:
    """Dataclasses from parsed values, without jsonargparse's Namespace reaching the program."""
    kwargs = {}
    for f in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        value = values[f.name]
        kwargs[f.name] = _build(f.type, value) if dataclasses.is_dataclass(f.type) else value  # pyright: ignore[reportArgumentType]
    return cls(**kwargs)


def _options(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option of a nested dataclass, dotted, with its type."""
    for f in dataclasses.fields(cls):
        yield prefix + f.name, f.type
        if dataclasses.is_dataclass(f.type):
            yield from _options(f.type, f"{prefix}{f.name}.")  # pyright: ignore[reportArgumentType]


def _unknown(name: str, names: Sequence[str]) -> str:
    """An option of the same last word is nearer than one that looks alike."""
    same = [other for other in names if other.split(".")[-1] == name.split(".")[-1]]
    return f"unknown option {name}{nearest(same[0] if same else name, same or names)}"


def _one_line(message: str, cls: type) -> str:
    """jsonargparse's message in one line, with the nearest option names where a name is unknown."""
    names = ["config", *(name for name, _ in _options(cls))]
    if found := re.search(r"unrecognized arguments: (?:.* )?--([^\s=]+)|(?:accept option|Option) '(\S+)'", message):
        group = re.search(r"Group '(\S+)' does", message)
        return _unknown(found[1] or (f"{group[1]}.{found[2]}" if group else found[2]), names)
    if found := re.search(r"unrecognized arguments: (\S+)", message):
        return f"{found[1]!r} belongs to no option; a list is written in quotes and brackets, '[1e-3, 3e-3]'"
    if found := re.search(r"Parser key \"(\S+)\":.*NestedArg\(key='([^']+)'", message, re.DOTALL):
        return _unknown(f"{found[1]}.{found[2]}", names)
    if found := re.search(r'Parser key "(\S+)":\s*(.*)', message, re.DOTALL):
        lines = [line.strip() for line in found[2].splitlines()]
        if short := re.fullmatch(r"Expected a <class '(\w+)'>\. Got value: (.*)", lines[0]):
            how = "; a list is written in quotes and brackets, '[a, b]'" if short[1] == "list" else ""
            return f"--{found[1]}: {short[2]!r} is not {short[1]}{how}"
        given = next((line.removeprefix("Given value: ") for line in lines if line.startswith("Given value: ")), None)
        wanted = [line.removeprefix("- ").removeprefix("Expected a ") for line in lines if "Expected a" in line]
        if given is not None and wanted:
            wanted = [re.sub(r"<class '(\w+)'>", r"\1", w.split(". Got value: ")[0]) for w in wanted]
            wanted = list(dict.fromkeys(w.replace("NoneType", "null") for w in wanted))
            wanted = [w.replace("typing.Literal", "one of ") for w in wanted]
            entries = given.startswith("[") and "list" in str(dict(_options(cls)).get(found[1]))
            what = f"an entry of {given!r}" if entries else repr(given)
            how = "; a list is written in quotes and brackets, '[a, b]'" if "list" in wanted else ""
            return f"--{found[1].rstrip('_')}: {what} is not {' or '.join(wanted)}{how}"
        return f"--{found[1]}: " + " ".join(lines).replace("typing.Literal", "")
    if found := re.fullmatch(r"the following arguments are required: (.*)", message):
        return f"needed: --{found[1].replace(', ', ', --')}; --help has all options"
    if message.startswith("Problems parsing config"):
        return f"--config is no YAML that can be read: {' '.join(message.split(':', 1)[1].split())}"
    return " ".join(message.split())
