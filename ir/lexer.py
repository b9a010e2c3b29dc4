"""Tokens of the text form, taken one at a time, and errors that show where in the text they are."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from graphwright.ir.errors import ProgramError

_SKIPPED = re.compile(r"(?:\s+|//[^\n]*)+")
_TOKENS = re.compile(
    r"""
    (?P<string>"(?:[^"\\\n]|\\.)*")
  | (?P<value>%[A-Za-z_]\w*)
  | (?P<path>@(?:[A-Za-z0-9_./\-]+|"(?:[^"\\\n]|\\.)*"))
  | (?P<tag>\#(?:[A-Za-z0-9_./\-]+|"(?:[^"\\\n]|\\.)*"))
  | (?P<number>-?(?:\d+\.(?!\.)\d*(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|\d+)|-inf\b)
  | (?P<word>[A-Za-z_]\w*(?:\.[A-Za-z_0-9]\w*)*)
  | (?P<mark>\.\.|[(){}\[\],:=*?])
    """,
    re.VERBOSE,
)
_OPENING, _CLOSING = "([", ")]"


@dataclass(frozen=True)
class Token:
    """One token: its kind, its text, where it starts."""

    kind: str
    text: str
    start: int

    def __str__(self) -> str:
        return "the end of the text" if self.kind == "end" else f"'{self.text}'"


class Lexer:
    """Reads a text from its beginning; the grammar is the caller's."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._position = 0
        self._next: Token | None = None

    def peek(self) -> Token:
        """The next token, left in place.

        Raises:
            ProgramError: no token starts here.
        """
        if self._next is None:
            skipped = _SKIPPED.match(self.text, self._position)
            start = skipped.end() if skipped else self._position
            if start >= len(self.text):
                self._next = Token("end", "", len(self.text))
            else:
                found = _TOKENS.match(self.text, start)
                if found is None:
                    character = self.text[start]
                    hint = "a string ends on the line it begins on" if character == '"' else None
                    raise self.error(f"{character!r} cannot stand here", at=start, hint=hint)
                self._next = Token(found.lastgroup or "", found.group(), start)
            self._position = self._next.start + len(self._next.text)
        return self._next

    def next(self) -> Token:
        """The next token, taken."""
        token = self.peek()
        self._next = None
        return token

    def accept(self, text: str) -> bool:
        """Take the next token if it is this mark or word."""
        token = self.peek()
        if token.text != text or token.kind not in ("mark", "word"):
            return False
        self.next()
        return True

    def expect(self, text: str) -> None:
        """Take this mark or word.

        Raises:
            ProgramError: something else stands here.
        """
        if not self.accept(text):
            raise self.error(f"expected '{text}', found {self.peek()}")

    def take(self, kind: str, what: str) -> str:
        """Take a token of this kind.

        Raises:
            ProgramError: something else stands here.
        """
        if self.peek().kind != kind:
            raise self.error(f"expected {what}, found {self.peek()}")
        return self.next().text

    def string(self, what: str) -> str:
        """Take a quoted string and give what it says."""
        start = self.place()
        return self.unquote(self.take("string", what), start)

    def unquote(self, text: str, at: int) -> str:
        """What a quoted string says."""
        try:
            value: str = json.loads(text, strict=False)
        except json.JSONDecodeError as error:
            raise self.error(
                f"the string is not valid: {error.msg}", at=at, hint="strings are written as JSON"
            ) from error
        return value

    def integer(self, what: str) -> int:
        """Take a whole number."""
        start, text = self.place(), self.take("number", what)
        try:
            return int(text)
        except ValueError:
            raise self.error(f"expected {what}, found '{text}'", at=start) from None

    def json(self) -> Any:
        """Take a JSON value."""
        start = self.place()
        try:
            value, end = json.JSONDecoder().raw_decode(self.text, start)
        except json.JSONDecodeError as error:
            raise self.error(f"expected a JSON value: {error.msg}", at=error.pos) from error
        self._next, self._position = None, end
        return value

    def size(self) -> str:
        """Take the text of a size in a type: everything up to a comma or bracket that does not belong to it."""
        start = end = self.place()
        depth = 0
        while end < len(self.text) and self.text[end] != "\n":
            character = self.text[end]
            if depth == 0 and (character in _CLOSING or character == ","):
                break
            depth += (character in _OPENING) - (character in _CLOSING)
            end += 1
        text = self.text[start:end].strip()
        if not text or depth:
            raise self.error("expected a size: a number or an expression over dimensions", at=start)
        self._next, self._position = None, end
        return text

    def place(self) -> int:
        """Where the next token starts."""
        return self.peek().start

    def error(self, what: str, *, at: int | None = None, hint: str | None = None) -> ProgramError:
        """An error that names line and column and shows the line."""
        where, context = self.describe(self.place() if at is None else at)
        return ProgramError(what, where=where, hint=hint, context=context)

    def describe(self, position: int) -> tuple[str, list[str]]:
        """``line 3, column 7`` and the line with a caret under the column; long lines are cut."""
        before = self.text[:position]
        number, start = before.count("\n") + 1, before.rfind("\n") + 1
        line = self.text[start:].split("\n", 1)[0].replace("\t", " ")
        column = position - start
        first = max(0, column - 80)
        shown = ("..." if first else "") + line[first : first + 160]
        return f"line {number}, column {column + 1}", [shown, " " * (column - first + (3 if first else 0)) + "^"]
