"""Names in an experiment file -> Python objects, and their schema from the signature.

A name is one of

* a short name in the table of its kind (`"fedtune"`), kept as a string `"module:attribute"` so that
  nothing heavy is imported before it is used;
* a prefix name (`"npz:data/mine.npz"`): the table holds `"npz:"`, the rest becomes the object's first
  keyword argument;
* `"package.module:Name"`: anything importable;
* an entry point of the group `fedsim.<kind>` of any installed package.

The schema of a section *is* the signature of what its name resolves to: positional-only parameters are
given by the platform, every other parameter is a key of the experiment file, checked strictly (types,
ranges given with `Annotated`, no unknown keys).
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from fedsim.errors import UserError, close_to, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel

#: kind -> "module:table"; a table maps a short name to "module:attribute"
TABLES = {
    "strategies": "strategies:STRATEGIES",
    "clients": "clients:CLIENTS",
    "models": "fedsim.models:MODELS",
    "tuning": "fedsim.models:TUNING",
    "datasets": "fedsim.data:DATASETS",
    "partitions": "fedsim.data:PARTITIONS",
    "detachers": "fedsim.unlearning:DETACHERS",
    "engines": "fedsim.engine:ENGINES",
    "edits": "strategies:EDITS",
    "local": "fedsim.local_learning:METHODS",
}

#: prefix -> "module:function" that lists what may stand behind it
MEMBERS = {
    "torchvision:": "fedsim.data.torchvision_sets:names",
    "timm:": "fedsim.models.timm_models:names",
    "open_clip:": "fedsim.models.open_clip_models:names",
}

#: first words of a docstring's section, as Google's style writes them and as NumPy's (Flower's strategies)
_SECTION = re.compile(r"(Args|Attributes|Parameters|Returns|Raises|Notes)(:| -{3,})")
_TOML_TYPES = (bool, int, float, str, list, tuple, dict, type(None))


@dataclass(frozen=True)
class Resolved:
    """What a name stands for: the object, and the keyword arguments already fixed by the name itself."""

    name: str
    target: Callable[..., Any]
    fixed: Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One key of a section: its type as text, its default (or `inspect.Parameter.empty`), its doc line."""

    name: str
    type: str
    default: Any
    doc: str

    @property
    def required(self) -> bool:
        """True when the experiment file must give this key."""
        return self.default is inspect.Parameter.empty


def load(target: str) -> Any:
    """Import `"package.module:attribute"`."""
    module_name, _, attribute = target.partition(":")
    return getattr(import_module(module_name), attribute)


@cache
def table(kind: str) -> dict[str, str]:
    """Short name -> target for one kind: the built-in table and installed entry points."""
    found: dict[str, str] = {}
    for point in entry_points(group=f"fedsim.{kind}"):
        found[point.name] = point.value
    found.update(load(TABLES[kind]))
    return found


def resolve(kind: str, name: str) -> Resolved:
    """Find `name` among the objects of `kind`; raises UserError with the nearest right name."""
    names = table(kind)
    if name in names:
        return Resolved(name, load(names[name]), {})
    prefix, colon, rest = name.partition(":")
    if colon and f"{prefix}:" in names:
        target = load(names[f"{prefix}:"])
        return Resolved(name, target, {next(iter(_user_parameters(target))): rest})
    if colon:
        try:
            found = load(name)
            if not callable(found):
                raise UserError(f"'{name}' is a {type(found).__name__}, not a class or function")
            return Resolved(name, found, {})
        except (ImportError, AttributeError) as error:
            close = close_to(f"{prefix}:", [known for known in names if known.endswith(":")])
            meant = "" if close is None else f" did you mean '{close}{rest}'? Else"
            raise UserError(
                f"cannot import '{name}' ({error});{meant} the form is 'package.module:Name' and the module "
                "must be next to the experiment file, in the current folder or installed"
            ) from error
    raise UserError(f"unknown name '{name}' in {kind}: {_meant(name, names)} (fedsim list {kind})")


def _meant(name: str, names: Mapping[str, str]) -> str:
    """The nearest name, also of those behind a prefix; the same letters and digits come first."""
    behind = [
        f"{prefix}{one}" for prefix, known in MEMBERS.items() if prefix in names for one in load(known)()
    ]
    for one in (*names, *behind):
        if _letters(one.partition(":")[2] or one) == _letters(name):
            return f"did you mean '{one}'?"
    if close_to(name, names) is None:
        members = {one.partition(":")[2]: one for one in reversed(behind)}
        close = close_to(name, members)
        if close is not None:
            return f"did you mean '{members[close]}'?"
    return nearest(name, names)


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _user_parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that are keys of an experiment file (those of TOML-representable type)."""
    hints = typing.get_type_hints(_function(target), include_extras=True)
    found = {}
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = hints.get(parameter.name, Any)
        if _is_toml(annotation):
            found[parameter.name] = parameter.replace(annotation=annotation)
    return found


def _function(target: Callable[..., Any]) -> Callable[..., Any]:
    return vars(target).get("__init__", target.__init__) if inspect.isclass(target) else target


def _is_toml(annotation: Any) -> bool:
    """Can a value of this annotation stand in a TOML file? (Callables and objects cannot.)"""
    if annotation is Any or isinstance(annotation, typing.TypeVar):
        return True
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return True
    if origin is typing.Annotated:
        return _is_toml(typing.get_args(annotation)[0])
    if origin is not None and (origin in (typing.Union, list, tuple, dict) or "Union" in str(origin)):
        return all(_is_toml(part) for part in typing.get_args(annotation) if part is not Ellipsis)
    return isinstance(annotation, type) and issubclass(annotation, _TOML_TYPES)


def schema(target: Callable[..., Any], *, name: str = "options") -> type[BaseModel]:
    """A strict pydantic model whose fields are the keys of an experiment section."""
    from pydantic import ConfigDict, create_model

    fields: dict[str, Any] = {
        key: (p.annotation, ... if p.default is p.empty else p.default)
        for key, p in _user_parameters(target).items()
    }
    return create_model(
        name,
        __config__=ConfigDict(
            extra="forbid", strict=True, protected_namespaces=(), arbitrary_types_allowed=True
        ),
        **fields,
    )


def describe(target: Callable[..., Any]) -> list[Parameter]:
    """The keys of a section with type, default and the line that the docstring says of each."""
    docs = _argument_docs(target)
    return [
        Parameter(key, _type_text(p.annotation), p.default, docs.get(key, ""))
        for key, p in _user_parameters(target).items()
    ]


def description(target: Callable[..., Any]) -> list[str]:
    """The docstring's paragraphs up to its first section, each on one line."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.getdoc(target) or "")]
    sections = (number for number, text in enumerate(paragraphs) if _SECTION.match(text))
    return paragraphs[: next(sections, None)]


def summary(target: Callable[..., Any]) -> str:
    """First line of the docstring."""
    lines = (inspect.getdoc(target) or "").strip().splitlines()
    return lines[0] if lines else ""


def _argument_docs(target: Callable[..., Any]) -> dict[str, str]:
    """`name: text` lines of the Args sections (of a class: its ancestors', too; its own win)."""
    if inspect.isclass(target):
        found: dict[str, str] = {}
        for cls in reversed(target.__mro__):
            found.update(_args_section(inspect.cleandoc(cls.__doc__ or "")))
        return found
    return _args_section(inspect.getdoc(target) or "")


def _args_section(text: str) -> dict[str, str]:
    """One docstring's Args (continuation lines are joined)."""
    found: dict[str, str] = {}
    key = None
    inside = False
    for line in text.splitlines():
        if line.strip() in ("Args:", "Arguments:"):
            inside = True
            continue
        if inside and line and not line.startswith(" "):
            inside = False
        if not inside:
            continue
        match = re.match(r"^ {4}(\w+): (.*)$", line)
        if match:
            key = match[1]
            found[key] = match[2].strip()
        elif key and line.strip():
            found[key] += " " + line.strip()
    return found


def _type_text(annotation: Any) -> str:
    """A short, readable type: `float > 0`, `"sgd" | "adamw"`; None, which TOML cannot say, is left out."""
    if typing.get_origin(annotation) is typing.Annotated:
        base, *extras = typing.get_args(annotation)
        return f"{_type_text(base)} {' and '.join(filter(None, map(_range_text, extras)))}".strip()
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(
            f'"{value}"' if isinstance(value, str) else str(value) for value in typing.get_args(annotation)
        )
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation.__name__
    if typing.get_args(annotation) and "Union" in str(typing.get_origin(annotation)):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        return " | ".join(map(_type_text, parts))
    return str(annotation).replace("typing.", "")


def _range_text(extra: Any) -> str:
    for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        if hasattr(extra, attribute) and not hasattr(extra, "metadata"):
            return f"{sign} {getattr(extra, attribute)}"
    return ", ".join(filter(None, map(_range_text, getattr(extra, "metadata", []))))
