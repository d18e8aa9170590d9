"""Find the files below an evaluation set's folder by the names in the set's own files."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath

from pipeline.data.sample import BYTE_ORDER_MARK, PICTURE_ENDINGS, VIDEO_SUFFIXES, text_fault
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.documents import utf8_text

PICTURES = PICTURE_ENDINGS
VIDEOS = frozenset(VIDEO_SUFFIXES)
MEND = "correct it; a set must be complete"
_THREADS = 16


@dataclass(frozen=True)
class Folder:
    """The files below a folder, except hidden ones.

    url: of the folder.
    files: path below it -> URL, sorted by URL.
    stamps: URL -> stamp, see `objects.stamps`.
    """

    url: str
    files: dict[str, str]
    stamps: dict[str, str]

    @classmethod
    def of(cls, url: str) -> "Folder":
        """List a folder, local or on S3. Raises PipelineError if it is empty."""
        # Archives from a Mac have a file ._NAME.jpg, which is not a picture, for each NAME.jpg.
        stamps = {each: stamp for each, stamp in objects.stamps(url).items() if not _name(each).startswith(".")}
        if not stamps:
            raise PipelineError(f"{url} has no files: give the folder of the evaluation set")
        if "://" in url:
            return cls(url, {each.removeprefix(url.rstrip("/") + "/"): each for each in stamps}, stamps)
        return cls(url, {Path(each).relative_to(url).as_posix(): each for each in stamps}, stamps)

    @property
    def name(self) -> str:
        """The name of the folder, which is also the name of a user's own set."""
        return _name(self.url.rstrip("/") if "://" in self.url else str(Path(self.url).resolve()))

    def named(self, *names: str) -> str:
        """Return the URL of the file with the first of these names that exists; * matches anything.

        Raises PipelineError if no file or several files have the name.
        """
        for name in names:
            found = [url for path, url in self.files.items() if fnmatchcase(_name(path), name)]
            if len(found) > 1:
                raise PipelineError(f"{self.url} has both {found[0]} and {found[1]}: keep only one {name}")
            if found:
                return found[0]
        raise PipelineError(f"{self.url} has no {' or '.join(names)}, which lists the items of this evaluation set")

    def media(self, name: str, suffixes: frozenset[str]) -> str:
        """Return the URL of a picture or video by its name, with or without suffix, in a set's file.

        The file's path ends with the name, or else with the name's last part. Raises PipelineError if no file or
        several files match.
        """
        wanted = stem(name, suffixes)
        called = [path for path in self._by_name.get(_name(wanted), []) if _suffix(path) in suffixes]
        found = [path for path in called if f"/{stem(path, suffixes)}".endswith(f"/{wanted}")] or called
        if not found:
            raise PipelineError(
                f"{self.url} has no file {name} ({', '.join(sorted(suffixes))}), which the evaluation set lists: "
                "a score without it would not be comparable"
            )
        if len(found) > 1:
            raise PipelineError(f"{self.url}: {name} may be {found[0]} or {found[1]}: keep only one of them")
        return self.files[found[0]]

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """Name of a picture or video, without suffix -> its paths."""
        paths: dict[str, list[str]] = {}
        for path in self.files:
            if _suffix(path) in PICTURES | VIDEOS:
                paths.setdefault(PurePosixPath(path).stem, []).append(path)
        return paths


def read_text(url: str) -> str:
    """Return a file's text. Raises PipelineError if it is not UTF-8."""
    try:
        return utf8_text(objects.read(url))
    except ValueError as error:
        raise PipelineError(f"{url} {error}") from None


def read_texts(urls: Sequence[str]) -> list[str]:
    """Return the texts of many small files, read in parallel to hide S3's latency."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read_text, urls))


@contextmanager
def expecting(url: str, form: str) -> Iterator[None]:
    """Turn errors from a file in an unexpected form into a PipelineError with the file and the expected form."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise PipelineError(f"{url} is not {form}: {reason}") from None


def plain_text(text: object, where: str) -> str:
    """Return a text without byte-order marks at its ends. Raises PipelineError if it has a `text_fault`."""
    if not isinstance(text, str):
        raise PipelineError(f"{where} is {text!r}, not a text")
    if fault := text_fault(text):
        raise PipelineError(f"{where} cannot be used: {': '.join(fault)}; {MEND}")
    return text.strip(BYTE_ORDER_MARK)


def stem(name: str, suffixes: frozenset[str]) -> str:
    """Return the path without its suffix, if that is in `suffixes`."""
    path = PurePosixPath(name)
    return str(path.with_suffix("") if _suffix(name) in suffixes else path)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix[1:].lower()
