"""The part of YAML that a mixture needs, read with the standard library.

Mappings by indentation, lists and mappings in brackets, text, numbers, true and false, comments. What it
reads, PyYAML reads alike; the rest of YAML is refused, with the line.
"""

from __future__ import annotations

import re
from typing import Any, Dict, List, Optional, Tuple, Union

Value = Union[bool, int, float, str, List[Any], Dict[str, Any]]

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<quoted>'(?:[^']|'')*'|"[^"\\]*")
    | (?P<plain>(?:[^\s'"\[\]{},&*!|>%@`\#?:=<-]|-(?=[^\s,\[\]{}]))
                (?:[^\s,\[\]{}:\#]|:(?=[^\s,\[\]{}])|(?<=\S)\#|\ +(?=[^\s\#]))*)
    | (?P<mark>[\[\]{},]|:(?=\s|$|[,\[\]{}]))
    | (?P<comment>(?:(?<=\s)|^)\#.*)
    )""",
    re.VERBOSE,
)
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)\.[0-9]*(?:[eE][-+][0-9]+)?", re.ASCII)
# What YAML 1.1 may take for an octal, a date, a time, ...
_UNCLEAR = re.compile(r"[-+]?[.0-9][-+0-9_:.a-fA-FxoTZ ]*|[-+]?\.(?:inf|nan)|---|\.\.\.", re.ASCII | re.I)
_WORDS = {"yes": "true", "on": "true", "no": "false", "off": "false"}

Token = Tuple[str, str]


def read_yaml(text: str) -> Dict[str, Value]:
    """Return a file's mapping.

    Raises:
        ValueError: it is malformed, or uses more of YAML; begins with ``line 3:``.
    """
    root: Dict[str, Value] = {}
    # Mappings that are open, by the indentation of their keys; None: the next line's.
    stack: List[Tuple[Optional[int], Dict[str, Value]]] = [(0, root)]
    for number, line in enumerate(text.lstrip("\ufeff").splitlines(), 1):
        try:
            _read_line(line, stack)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return root


def _read_line(line: str, stack: List[Tuple[Optional[int], Dict[str, Value]]]) -> None:
    tokens = _tokens(line)
    if not tokens:
        return
    indent = len(line) - len(line.lstrip(" "))
    opened, mapping = stack[-1]
    if opened is None:
        if indent <= (stack[-2][0] or 0):
            stack.pop()  # there is nothing in it
        else:
            stack[-1] = (indent, mapping)
    while indent < (stack[-1][0] or 0):
        stack.pop()
    opened, mapping = stack[-1]
    if indent != opened:
        raise ValueError("it is indented neither as the line above nor as one before it")
    key = _key(tokens)
    if key in mapping:
        raise ValueError(f"{key} is there already")
    if tokens:
        mapping[key] = _value(tokens)
        if tokens:
            raise ValueError(f"{tokens[0][1]!r} is left over; text with , [ ] {{ or }} needs quotes")
    else:
        inner: Dict[str, Value] = {}
        mapping[key] = inner
        stack.append((None, inner))


def _tokens(line: str) -> List[Token]:
    tokens: List[Token] = []
    end = 0
    while line[end:].strip():
        match = _TOKEN.match(line, end)
        if match is None or "\t" in line[: match.start() + 1]:
            what = "a tab; indent by spaces" if "\t" in line[: end + 1] else repr(line[end:].strip())
            raise ValueError(f"can't read {what}" + ("" if "tab" in what else "; put quotes around text"))
        kind = str(match.lastgroup)
        if kind != "comment":
            tokens.append((kind, match[kind].rstrip()))
        end = match.end()
    return tokens


def _key(tokens: List[Token]) -> str:
    kind, text = tokens.pop(0)
    if kind == "mark" or not tokens or tokens.pop(0) != ("mark", ":"):
        raise ValueError("there has to be `key: value`")
    key = _scalar(kind, text)
    if not isinstance(key, str):
        raise ValueError(f"{text} has to stand in quotes, to be a name")
    return key


def _value(tokens: List[Token]) -> Value:
    kind, text = tokens.pop(0)
    if text == "[" and kind == "mark":
        items: List[Any] = []
        while _goes_on(tokens, "]"):
            items.append(_value(tokens))
            _comma(tokens, "]")
        return items
    if text == "{" and kind == "mark":
        mapping: Dict[str, Any] = {}
        while _goes_on(tokens, "}"):
            key = _key(tokens)
            if key in mapping:
                raise ValueError(f"{key} is there already")
            if not tokens:
                break
            mapping[key] = _value(tokens)
            _comma(tokens, "}")
        return mapping
    if kind == "mark":
        raise ValueError(f"{text!r} stands where a value should")
    return _scalar(kind, text)


def _goes_on(tokens: List[Token], end: str) -> bool:
    """Return whether another item comes; take the end."""
    if not tokens:
        raise ValueError(f"{end!r} is missing in this line")
    if tokens[0] == ("mark", end):
        tokens.pop(0)
        return False
    return True


def _comma(tokens: List[Token], end: str) -> None:
    if tokens and tokens[0] == ("mark", ","):
        tokens.pop(0)
    elif not tokens or tokens[0] != ("mark", end):
        raise ValueError(f"{end!r} is missing in this line")


def _scalar(kind: str, text: str) -> Union[bool, int, float, str]:
    if kind == "quoted":
        return text[1:-1].replace("''", "'") if text[0] == "'" else text[1:-1]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in _WORDS:
        raise ValueError(f"{text}: write {_WORDS[text.lower()]}, or put quotes around it")
    if text.lower() in ("~", "null"):
        raise ValueError(f"{text}: give a value, or leave the line out")
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _UNCLEAR.fullmatch(text):
        raise ValueError(f"{text}: a number is written as 10 or 0.25; put quotes around text")
    return text
