"""Read and check JSON files that may be damaged; every error names the file and says what to do."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import PipelineError, printable, shown

FIXED = ConfigDict(extra="forbid")  # `__pydantic_config__` of a dataclass: an unknown member is an error
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


class DocumentError(PipelineError):
    """A document that is damaged, or has another form than expected."""


def parse_json(data: bytes | str, name: str, form: Any = Any, *, remedy: str, nan: bool = False) -> Any:
    """Parse the JSON content of the file or URL `name` as a `form`, a type that pydantic can validate.

    Types are strict: 4.0 and "4" are not integers. A byte-order mark is skipped. Raises DocumentError, whose message
    ends with the `remedy`, if the content is not JSON, has another form, or has a key twice in an object.

    nan: accept NaN and Infinity, which Python writes. Otherwise they are an error.
    """
    text = ""
    try:
        text = utf8_text(data) if isinstance(data, bytes) else data.removeprefix("\ufeff")
        parsed = json.loads(text, object_pairs_hook=unique, parse_constant=None if nan else _refuse_constant)
        return parsed if form is Any else adapter(form).validate_json(text, strict=True)
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
    """Decode UTF-8, without a byte-order mark. ValueError says what it is instead: "is UTF-16: ..."."""
    if why := foreign(data[:8]):
        raise _Refused(why)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Refused(f"is not UTF-8: byte {error.start + 1}") from None


def foreign(head: bytes) -> str:
    """Say why a text file that begins with these bytes is not UTF-8: "is compressed by gzip"; "" if it may be UTF-8."""
    if packed := packed_by(head):
        return f"is compressed by {packed}: unpack it"
    if head and not head.strip(b"\0"):
        return "is damaged: it begins with zeros"
    encoding = json.detect_encoding(head).upper()  # by its byte-order mark, or by the positions of zero bytes
    if encoding.startswith("UTF-8"):
        return ""
    return f"is {encoding[:6]}: convert it with iconv -f {encoding[:6]}{encoding[7:]} -t UTF-8"


def packed_by(head: bytes) -> str | None:
    """The program that compressed a file which begins with these bytes, or None."""
    return next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)


_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def explained(error: ValidationError) -> str:
    """Describe one error of a validation: the place, and the expected value. An unknown member comes first."""
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
    """Say why a text is not JSON, given the parser's error."""
    begin = text.lstrip()[:1]
    if not begin:
        return "is empty, but should be JSON"
    if begin == "<":
        return "is HTML or XML, but should be JSON: a proxy or a login page may have answered"
    return f"is damaged: it is not JSON ({error})"


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of (key, value) pairs. ValueError if a key occurs twice, since one of its values would be lost."""
    if len(result := dict(pairs)) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise _Refused(f"has the key {twice!r} twice in an object")
    return result


def _refuse_constant(name: str) -> None:
    raise _Refused(f"has {name}, which is not a JSON number")


class _Refused(ValueError):
    """The message completes "FILE ..."."""


def check_members(
    where: str, found: Iterable[str], known: Collection[str], *, kind: str = "column", matters: str | None = None
) -> None:
    """Check the columns (or keys) that were found against those that the reader knows.

    Raises PipelineError for a column that occurs twice, for one that looks like a misspelling of a known column that is
    missing, and for one whose name matches `matters`, the pattern of names that change what a row means. Other unknown
    columns are listed once on stderr.
    """
    found = list(found)
    if twice := [name for name, times in Counter(found).items() if times > 1]:
        raise PipelineError(f"{where} has the {kind} {twice[0]!r} twice: remove one of them")
    unknown = dict.fromkeys(name for name in found if name not in known)
    missing = {name.lower(): name for name in known if name not in found}
    for name in unknown:
        near = get_close_matches(name.strip("\ufeff ").lower(), missing, 1, 0.85)
        if near:
            hint = f"did you mean {missing[near[0]]}?"
        elif matters and re.search(matters, name, re.IGNORECASE) and not re.search("ids?$", name, re.IGNORECASE):
            hint = f"the known ones are {', '.join(known)}; remove it, or rename it"
        else:
            continue
        raise PipelineError(f"{where} has the {kind} {name!r}, which nothing reads: {hint}")
    note_unread(where, unknown, kind=kind)


_noted: set[tuple[str, str]] = set()


def note_unread(where: str, names: Iterable[str], *, kind: str) -> None:
    """Print a note on stderr of rank 0, once for each name, that nothing reads these names."""
    if new := [name for name in names if (kind, name) not in _noted]:
        _noted.update((kind, name) for name in new)
        if os.environ.get("RANK", "0") == "0":
            text = f"note: nothing reads the {kind}{'s' * (len(new) > 1)} {', '.join(new)} of {where}"
            print(printable(text), file=sys.stderr, flush=True)


# pydantic's validator of a type, made once.
adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
