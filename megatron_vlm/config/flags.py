"""Dataclass fields as command-line flags.

A field declared with :func:`flag` is the one source of its flag's name, type, default, choices and
help. A JSON file is read by turning its values into the same flags, so that both are checked alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import math
import re
import typing
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

from megatron_vlm.config import other_trainers

REQUIRED: Any = dataclasses.MISSING  # no fixed default: worked out from other values
_FLAG = re.compile(r"--[A-Za-z][\w-]*")
_VALUE = re.compile(r"(?!-)|-\.?\d")  # how a word begins that belongs to the flag before it
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
_NEAR = 0.75  # of difflib's ratio: a letter or two that are wrong, and no other word


def flag(
    group: str,
    default: Any,
    help: str,
    *,
    short: Optional[str] = None,
    choices: Optional[Tuple[Any, ...]] = None,
    switches: bool = False,
    shown_default: Optional[str] = None,
    not_yet: Optional[str] = None,
    verbatim: bool = False,
    site: bool = False,
) -> Any:
    """Return a dataclass field that is a flag, ``--like_this`` spelled ``--like-this``.

    Args:
        group: heading in ``--help``.
        default: the field's default, or :data:`REQUIRED`.
        help: one phrase.
        short: a short option such as ``-g``.
        choices: the values that are allowed.
        switches: each choice is a flag of its own (``--bf16``, ``--fp32``) instead of a value.
        shown_default: what ``--help`` says when the default is not a fixed value.
        not_yet: the feature is not available; says what to do instead.
        verbatim: the values of a list are not split at commas.
        site: a site file may give it.
    """
    metadata = {
        "group": group,
        "help": help,
        "short": short,
        "choices": choices,
        "switches": switches,
        "shown_default": shown_default,
        "not_yet": not_yet,
        "verbatim": verbatim,
        "site": site,
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(name: str) -> str:
    """Return the flag of a field: ``save_dir`` -> ``--save-dir``."""
    return "--" + name.replace("_", "-")


def negative_flag_name(name: str) -> str:
    """Return the flag that turns a switch off: ``save`` -> ``--no-save``, ``no_x`` -> ``--x``."""
    return flag_name(name[3:] if name.startswith("no_") else "no_" + name)


class FlagParser(argparse.ArgumentParser):
    """The parser of flags to ``{field name: value}``; every problem is a one-line ``ValueError``.

    Args:
        sections: dataclasses whose fields are flags.
        groups: headings of ``--help``.
        from_others: the flags are those of training: what other trainers call them is answered with them.
    """

    def __init__(
        self,
        sections: Mapping[str, type],
        groups: Iterable[str],
        from_others: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=30, width=110
            ),
            **kwargs,
        )
        self._from_others = from_others
        self._fields: Dict[str, dataclasses.Field[Any]] = {}
        self._types: Dict[str, Any] = {}
        self._sections: Dict[str, str] = {}
        self._headings = {title: self.add_argument_group(title) for title in groups}
        for section, cls in sections.items():
            types = typing.get_type_hints(cls)
            for field in dataclasses.fields(cls):
                self._fields[field.name] = field
                self._types[field.name] = types[field.name]
                self._sections[field.name] = section
                self._add(field, types[field.name])

    def error(self, message: str) -> typing.NoReturn:
        missing = re.fullmatch(r"argument (--[\w-]+)\S*: expected .*one argument", message)
        if missing:
            message += f"; one that begins with - is written {missing[1]}=-..."
        raise ValueError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as ``ArgumentParser`` does; a flag may also be spelled with underscores."""
        return super().parse_known_args([self._spelled(word) for word in args], namespace)

    def read(self, argv: Sequence[str]) -> Dict[str, Any]:
        """Return the values that ``argv`` gives, without defaults.

        Raises:
            ValueError: a flag is unknown, not available yet, or its value is not of its type.
        """
        self._check_words(argv)
        namespace, unknown = self.parse_known_args(list(argv))
        if unknown:
            name = unknown[0].split("=")[0]
            if not name.startswith("-"):
                where = "give it behind --config" if name.endswith(".json") else "values belong to a flag"
                raise ValueError(f"unexpected argument {name!r}; {where}")
            raise ValueError(f"unknown flag {name}{self._nearest(name, self._option_string_actions)}")
        given = vars(namespace)
        for name, value in given.items():
            not_yet = self._fields[name].metadata["not_yet"] if name in self._fields else None
            if not_yet and value:
                raise ValueError(f"{flag_name(name)} is not available yet; {not_yet}")
        return given

    def read_json(self, values: Any, where: str) -> Dict[str, Any]:
        """Return the values that a JSON object gives: flags, at the top level or inside their section.

        Args:
            values: the parsed object; ``null`` leaves a flag at its default.
            where: names the object in messages.

        Raises:
            ValueError: a key is unknown, or a value is not of its flag's type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected a JSON object of flags")
        others = [said for key, value in values.items() for said in self._keys_of_others(key, value)]
        if others:
            raise ValueError(f"{where}: {other_trainers.more(others)}")
        argv: List[str] = []
        for key, value in values.items():
            if key in set(self._sections.values()):
                if not isinstance(value, dict):
                    raise ValueError(f"{where}: {key} is a section; expected an object of flags")
                for name, inner in value.items():
                    if self._sections.get(name) != key:
                        raise ValueError(f"{where}: unknown key {key}.{name}{self._nearest_key(name, key)}")
                    argv += self._json_argv(name, inner, where)
            else:
                argv += self._json_argv(key, value, where)
        try:
            return self.read(argv)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def read_site(self, values: Any, where: str) -> Dict[str, Any]:
        """Return the values that a site file gives: flags at the top level, those alone that are a site's.

        ``environment`` may be an object, ``{"HF_HOME": "/scratch/hf"}``.

        Raises:
            ValueError: as :meth:`read_json`.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected a JSON object of flags")
        allowed = [name for name, field in self._fields.items() if field.metadata["site"]]
        for key in values:
            name = key.replace("-", "_")
            if name not in allowed and name in self._fields:
                raise ValueError(f"{where}: {key} is a run's, not a site's; put it in a --config file")
            if name not in allowed:
                raise ValueError(f"{where}: unknown key {key}{self._nearest(name, allowed)}")
        variables = values.get("environment")
        if isinstance(variables, dict):
            values = {**values, "environment": [f"{name}={value}" for name, value in variables.items()]}
        return self.read_json(values, where)

    def write(self, values: Mapping[str, Any]) -> List[str]:
        """Return the flags that give ``values``, leaving out those equal to a fixed default.

        Inverse of :meth:`read`.
        """
        argv: List[str] = []
        for name, value in values.items():
            if value is not None and value != self._fields[name].default:
                argv += self._argv(name, value)
        return argv

    def _spelled(self, word: str) -> str:
        """Return a flag as it is declared, where ``word`` is one with underscores; else as it is."""
        name, tie, value = word.partition("=")
        own = name.replace("_", "-")
        return own + tie + value if name.startswith("--") and own in self._option_string_actions else word

    def _check_words(self, argv: Sequence[str]) -> None:
        """Refuse what other trainers' command lines hold: their arguments, and switches with values."""
        said: List[str] = []
        for i, word in enumerate(argv):
            typed, tie, value = word.partition("=")
            if not _FLAG.fullmatch(typed):
                continue
            values = [value] if tie else list(itertools.takewhile(_VALUE.match, argv[i + 1 :]))
            given = values[0] if values else None
            action = self._option_string_actions.get(self._spelled(typed))
            if action is None:
                said += filter(None, [self._of_others(typed, values or None)])
            elif given is not None and action.nargs == 0 and action.dest in self._fields:
                other = None if given.lower() in _BOOLEANS else self._of_others(typed, given)
                said.append(other or self._without_value(typed, action, given))
            elif given is not None:
                said += filter(None, [self._of_others(typed, given, own=True)])
        if said:
            raise ValueError(other_trainers.more(said))

    def _of_others(self, typed: str, value: Any, own: bool = False) -> Optional[str]:
        return other_trainers.answer(typed, value, own) if self._from_others else None

    def _without_value(self, typed: str, action: Any, value: str) -> str:
        """Return the answer to ``--packing True``."""
        on, choices = _BOOLEANS.get(value.lower(), True), self._fields[action.dest].metadata["choices"]
        if on:
            instead = f"give {self._spelled(typed)} alone"
        elif choices:
            others = " or ".join(flag_name(choice) for choice in choices if choice != action.const)
            instead = f"leave it out, or give {others}"
        else:
            name = flag_name(action.dest)
            instead = f"give {negative_flag_name(action.dest) if action.const else name}"
        return f"{typed} {value}: a switch takes no value; {instead}"

    def _add(self, field: dataclasses.Field[Any], kind: Any) -> None:
        about = field.metadata
        names = [flag_name(field.name)] + ([about["short"]] if about["short"] else [])
        heading = self._headings[about["group"]]
        text = about["help"] + (" (not available yet)" if about["not_yet"] else _shown(field))
        text = text.replace("%", "%%")
        if about["switches"]:
            one_of = heading.add_mutually_exclusive_group()
            for i, choice in enumerate(about["choices"]):
                one_of.add_argument(
                    flag_name(choice),
                    dest=field.name,
                    action="store_const",
                    const=choice,
                    help=text if i == 0 else f"instead of {flag_name(about['choices'][0])}",
                )
        elif _without_optional(kind) is bool:
            heading.add_argument(*names, dest=field.name, action="store_const", const=True, help=text)
            off = negative_flag_name(field.name)
            off_help = "turn it off" if field.default is True else argparse.SUPPRESS
            heading.add_argument(off, dest=field.name, action="store_const", const=False, help=off_help)
        elif kind == Tuple[str, ...]:
            item = field.name.rstrip("s").split("_")[-1].upper()
            heading.add_argument(
                *names,
                dest=field.name,
                nargs="+",
                action=_AppendVerbatim if about["verbatim"] else _AppendList,
                metavar=item,
                help=text,
            )
        else:
            scalar = _without_optional(kind)
            metavar: Optional[str] = {int: "N", float: "X", str: "TEXT"}[scalar]
            if about["choices"]:
                metavar = None
            elif field.name.endswith(("dir", "path")) or field.name in ("input", "output"):
                metavar = "PATH"
            heading.add_argument(
                *names,
                dest=field.name,
                type=_finite if scalar is float else scalar,
                choices=about["choices"],
                metavar=metavar,
                help=text,
            )

    def _argv(self, name: str, value: Any) -> List[str]:
        if self._fields[name].metadata["switches"]:
            return [flag_name(value)]
        if value is True:
            return [flag_name(name)]
        if value is False:
            return [negative_flag_name(name)]
        if self._fields[name].metadata["verbatim"]:
            return [f"{flag_name(name)}={item}" for item in value]
        text = ",".join(value) if isinstance(value, (tuple, list)) else str(value)
        # A value that looks like a flag has to be tied to its own.
        return [f"{flag_name(name)}={text}"] if text.startswith("-") else [flag_name(name), text]

    def _keys_of_others(self, key: str, value: Any) -> Iterator[str]:
        """Yield the answers to a key, or to those inside it where it is a section."""
        if key in self._sections.values() and isinstance(value, dict):
            for name, inner in value.items():
                if name.replace("-", "_") not in self._fields:
                    yield from (f"{key}.{said}" for said in self._keys_of_others(name, inner))
        elif key in self._sections.values() and not isinstance(value, str):
            return
        elif self._spelled(flag_name(key)) not in self._option_string_actions and key not in self._fields:
            said = self._of_others(key, value)
            if said is not None:
                yield said

    def _json_argv(self, key: str, value: Any, where: str) -> List[str]:
        name = key.replace("-", "_")
        if value is None and name in self._fields:
            return []
        if name not in self._fields:
            # Flags that are not fields: --fp32, --no-save.
            action = self._option_string_actions.get(flag_name(name))
            if action is not None and action.dest in self._fields:
                if value is not True:
                    raise ValueError(f"{where}: {key} is {value!r}; expected true, or leave it out")
                return [flag_name(name)]
            raise ValueError(f"{where}: unknown key {key}{self._nearest_key(name)}")
        switch = _without_optional(self._types[name]) is bool
        if isinstance(value, bool) != switch:
            expected = "true or false" if switch else "a value, not true or false"
            raise ValueError(f"{where}: {key} is {value!r}; expected {expected}")
        if isinstance(value, dict) or isinstance(value, list) != (self._types[name] == Tuple[str, ...]):
            raise ValueError(f"{where}: {key} is {value!r}; expected {_kind_name(self._types[name])}")
        if isinstance(value, list) and not all(type(item) in (str, int, float) for item in value):
            raise ValueError(f"{where}: {key} is {value!r}; expected a list of strings or numbers")
        choices = self._fields[name].metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"{where}: {key} is {value!r}; choose from {', '.join(map(str, choices))}")
        return self._argv(name, [str(item) for item in value] if isinstance(value, list) else value)

    def _nearest_key(self, name: str, section: str = "") -> str:
        name = name.replace("-", "_")
        if name in self._sections:
            return f"; it belongs to section {self._sections[name]}"
        if section:
            return self._nearest(name, [n for n, s in self._sections.items() if s == section] or self._fields)
        return self._nearest(name, [*self._fields, *self._sections.values()])

    @staticmethod
    def _nearest(name: str, names: Iterable[str]) -> str:
        near = difflib.get_close_matches(name, list(names), n=1, cutoff=_NEAR)
        return f"; did you mean {near[0]}?" if near else "; see --help"


class _AppendList(argparse.Action):
    """Collects ``--bind a b``, ``--bind a,b`` and ``--bind a --bind b`` into one tuple of strings."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: Optional[str] = None,
    ) -> None:
        items = tuple(item for value in values for item in self.split(value) if item)
        setattr(namespace, self.dest, getattr(namespace, self.dest, ()) + items)

    @staticmethod
    def split(value: str) -> List[str]:
        return value.split(",")


class _AppendVerbatim(_AppendList):
    """The action of a list whose values may hold commas."""

    @staticmethod
    def split(value: str) -> List[str]:
        return [value]


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


_finite.__name__ = "float"  # argparse names it when the text is no number at all


def _without_optional(kind: Any) -> Any:
    return next((a for a in typing.get_args(kind) if a is not type(None)), kind)


def _kind_name(kind: Any) -> str:
    if kind == Tuple[str, ...]:
        return "a list"
    return {int: "an integer", float: "a number", str: "a string"}[_without_optional(kind)]


def _shown(field: dataclasses.Field[Any]) -> str:
    shown = field.metadata["shown_default"]
    unshown = field.default is False or field.default in (None, REQUIRED, "", ())
    if shown is None and not unshown:
        shown = "on" if field.default is True else field.default
    return "" if shown is None else f" (default: {shown})"
