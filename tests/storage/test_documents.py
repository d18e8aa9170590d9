"""The reader for untrusted JSON; warnings about unused columns; escaping for the terminal."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from pipeline.errors import PipelineError, printable
from pipeline.storage.documents import FIXED, DocumentError, check_members, parse_json


@dataclass
class Form:
    __pydantic_config__ = FIXED

    number: int
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("data", "form", "reason"),
    [
        (b"", Form, "F is empty, but should be JSON: R"),
        (b" \n\xef\xbb\xbf", Form, "F is damaged: it is not JSON .*: R"),
        (b"<html>busy</html>", Form, "F is HTML or XML, but should be JSON: a proxy .*: R"),
        (b"[" * 300_000, Form, "F is damaged: it is nested too deeply: R"),
        (b'{"number": 1', Form, r"F is damaged: it is not JSON \(.*line 1 column 13.*\): R"),
        (b'{"number": 1} x', Form, "F is damaged: it is not JSON .*: R"),
        (b'{"number": "\xff"}', Form, "F is not UTF-8: byte 13: R"),
        (
            '{"number": 1}'.encode("utf-16"),
            Form,
            "F is UTF-16: convert it with iconv -f UTF-16 -t UTF-8: R",
        ),
        (
            '{"number": 1}'.encode("utf-16-be"),
            Form,
            "F is UTF-16: convert it with iconv -f UTF-16BE -t UTF-8: R",
        ),
        (b"\x1f\x8b\x08", Form, "F is compressed by gzip: unpack it: R"),
        (bytes(20), Form, "F is damaged: it begins with zeros: R"),
        (b'{"number": NaN}', Form, "NaN, which is not a JSON number"),
        (b'{"number": 1, "number": 1}', Form, "has the key 'number' twice"),
        (b'{"number": 1.0}', Form, "F has another form than expected: number: .*integer, got 1.0: R"),
        (b'{"number": "1"}', Form, "number: .*integer, got '1'"),
        (b'{"numbre": 1}', Form, "F has another form than expected: numbre is unknown"),
        (b'{"number": 1, "nam\\u001bes": []}', Form, r"nam\\x1bes is unknown"),
        (b"{}", Form, "number is missing"),
        (b"[]", Form, "another form"),
        (b"[]", dict, "another form"),
        (b"9" * 5000, dict, "F "),
    ],
)
def test_damaged_document_error_names_cause_and_remedy(data, form, reason):
    with pytest.raises(DocumentError, match=reason) as caught:
        parse_json(data, "F", form, remedy="R")
    assert str(caught.value).isprintable()


def test_valid_documents_are_read():
    assert parse_json(b'\xef\xbb\xbf{"number": 1, "names": ["a", "\xc3\xa4"]}', "F", Form, remedy="") == Form(
        1, ("a", "ä")
    )
    assert parse_json("\ufeff[1.5, null]", "F", remedy="") == [1.5, None]


def test_unused_columns_are_noted_or_refused(capsys):
    known = ("text", "image", "caption")
    check_members("F", ["text", "image", "caption"], known)
    check_members("F", ["text", "image", "caption", "note", "captions"], known)  # no known column is missing
    check_members("G", ["text", "image", "note", "row_id"], known, matters="row")
    assert capsys.readouterr().err.splitlines() == [
        "note: nothing reads the columns note, captions of F",
        "note: nothing reads the column row_id of G",
    ]
    for found, said in [
        (["text", "text"], "F has the column 'text' twice"),
        (["Text", "image"], "F has the column 'Text', which nothing reads: did you mean text"),
        (["\ufefftext", "image"], r"F has the column '\\ufefftext', which nothing reads: did you mean text"),
        (["text", "image", "captions"], "did you mean caption"),
        (
            ["text", "start_time"],
            "F has the column 'start_time', which nothing reads: the known ones are text",
        ),
    ]:
        with pytest.raises(PipelineError, match=said):
            check_members("F", found, known, matters="start")


def test_control_characters_are_escaped():
    assert printable("ä 图.tar") == "ä 图.tar"
    assert printable("a\x1b[2J\x9b\0\n\u202eb\ud800") == r"a\x1b[2J\x9b\x00\n\u202eb\ud800"
    assert printable("two\nlines\r", keep="\n") == "two\nlines\\r"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("PipelineError('a\\x1b[31m\\nb')", "error: a\\x1b[31m\nb\n"),
        # torch raises it at any point of the process
        ("RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. ')",
         "error: a data worker failed: DataLoader worker (pid 7) is killed by signal: Killed. ; if it ran out of "
         "memory (or of /dev/shm), lower data.workers or data.memory_mb\n"),
    ],
)  # fmt: skip
def test_program_error_prints_message_without_traceback(error, said):
    program = (
        f"from pipeline.errors import PipelineError\n"
        f"from pipeline.jobs.program import command_line\ndef main(): raise {error}\ncommand_line(main)()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, said)
