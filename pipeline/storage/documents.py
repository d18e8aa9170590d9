"""JSON that others may damage: read in one place, so that each complaint names the file and says what to do."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import PipelineError, printable, shown

FIXED = ConfigDict(extra="forbid")  # `__pydantic_config__` of a dataclass: a member that nobody reads is an error
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


class DocumentError(PipelineError):
    """A document that is damaged, or of another form than expected."""


def parse_json(data: bytes | str, name: str, form: Any = Any, *, remedy: str, nan: bool = False) -> Any:
    """The JSON document in the content of the file (or answer of the URL) `name`, as a `form` that pydantic knows.

    Types are strict: 4.0 and "4" are no integers. A byte-order mark is skipped. Raises DocumentError, ended by the
    `remedy`, for what is no JSON or of another form, and for an object that has a key twice, of which one would be
    lost.

    nan: whether NaN and Infinity, which Python writes, are read as Python reads them, or the document is refused.
    """
    text = ""
    try:
        text = utf8_text(data) if isinstance(data, bytes) else data.removeprefix("\ufeff")
        found = json.loads(text, object_pairs_hook=unique, parse_constant=None if nan else _refuse_constant)
        return found if form is Any else adapter(form).validate_json(text, strict=True)
    except RecursionError:
        why = "is damaged: it is nested too deeply"
    except ValidationError as error:
        why = f"has another form than expected: {explained(error)}"
    except _Refused as error:
        why = str(error)
    except ValueError as error:
        why = no_json(text, error)
    raise DocumentError(f"{name} {why}: {remedy}")


def utf8_text(data: bytes) -> str:
    """A file's text, without a byte-order mark; ValueError that says what the file is instead: "is UTF-16, ..."."""
    if why := foreign(data[:8]):
        raise _Refused(why)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Refused(f"is not UTF-8: byte {error.start + 1}") from None


def foreign(head: bytes) -> str:
    """What a file of text is that begins with these bytes, if it is plainly no UTF-8; "" if it may be."""
    if packed := packed_by(head):
        return f"is compressed by {packed}: unpack it"
    if head and not head.strip(b"\0"):
        return "is damaged: it begins with zeros"
    encoding = json.detect_encoding(head).upper()  # by a byte-order mark, or by which bytes are zero
    if encoding.startswith("UTF-8"):
        return ""
    return f"is {encoding[:6]}: convert it, as iconv -f {encoding[:6]}{encoding[7:]} -t UTF-8 does"


def packed_by(head: bytes) -> str | None:
    """What compressed a file that begins with these bytes."""
    return next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)


_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def explained(error: ValidationError) -> str:
    """One of a validation's errors, that of an unknown member if there is any: where, and what is expected there."""
    errors = error.errors(include_url=False)
    first = next((each for each in errors if each["type"] in _UNKNOWN), errors[0])
    where = ".".join(printable(str(part)) for part in first["loc"])
    why = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{where} is missing"
    if first["type"] in _UNKNOWN:
        return f"{where} is unknown"
    return printable(f"{where}: {why}, got {shown(first['input'])}" if where else why)


def no_json(text: str, error: ValueError) -> str:
    """What to call a text that is no JSON, for this reason."""
    begin = text.lstrip()[:1]
    if not begin:
        return "is empty, where JSON is expected"
    if begin == "<":
        return "is HTML or XML, where JSON is expected: a proxy or a login page may have answered"
    return f"is damaged: it is no JSON ({error})"


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these; ValueError for a key that is there twice, of which one would be lost."""
    if (twice := doubled_key(pairs)) is not None:
        raise _Refused(f"has the key {twice!r} twice in an object")
    return dict(pairs)


def doubled_key(pairs: list[tuple[str, Any]]) -> str | None:
    """The first key that an object's pairs have twice, or None."""
    if len(dict(pairs)) == len(pairs):
        return None
    return next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)


def _refuse_constant(name: str) -> None:
    raise _Refused(f"has {name}, which is no number of JSON's")


class _Refused(ValueError):
    """It can be read, and some would read it otherwise."""


def check_members(
    where: str, found: Iterable[str], known: Collection[str], *, kind: str = "column", matters: str | None = None
) -> None:
    """Look at the columns (or keys) of a layout that may have others than those that are read.

    PipelineError for one that comes twice, one that is nearly called as a known one that is not there, and one that
    `matters`: a pattern of names that change what a row means. Others are listed once on stderr.
    """
    found = list(found)
    if twice := [name for name, times in Counter(found).items() if times > 1]:
        raise PipelineError(f"{where} has the {kind} {twice[0]!r} twice: leave one of them in it")
    unknown = dict.fromkeys(name for name in found if name not in known)
    lacking = {name.lower(): name for name in known if name not in found}
    for name in unknown:
        near = get_close_matches(name.strip("\ufeff ").lower(), lacking, 1, 0.85)
        if near or (
            matters and re.search(matters, name, re.IGNORECASE) and not re.search("ids?$", name, re.IGNORECASE)
        ):
            hint = (
                f"did you mean {lacking[near[0]]}?"
                if near
                else f"known are {', '.join(known)}; remove it, or rename it"
            )
            raise PipelineError(f"{where} has the {kind} {name!r}, which nothing reads: {hint}")
    note_unread(where, unknown, kind=kind)


_noted: set[tuple[str, str]] = set()


def note_unread(where: str, names: Iterable[str], *, kind: str) -> None:
    """Say on stderr, once for each name, that nothing reads these."""
    if new := [name for name in names if (kind, name) not in _noted]:
        _noted.update((kind, name) for name in new)
        note(f"nothing reads the {kind}{'s' * (len(new) > 1)} {', '.join(new)} of {where}")


def note(text: str) -> None:
    """Say on stderr, by one rank, what is no error and should be known."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(f"note: {text}"), file=sys.stderr, flush=True)


@cache
def adapter(form: Any) -> TypeAdapter:
    """What validates a `form`."""
    return TypeAdapter(form)
