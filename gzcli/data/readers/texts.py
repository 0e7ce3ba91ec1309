"""Texts and tables that describe images, in UTF-8 with or without a byte-order mark."""

from __future__ import annotations

import codecs
import csv
import io
import shlex
from collections.abc import Iterator
from pathlib import PurePosixPath

from gzcli.core.errors import UsageError
from gzcli.data.readers.images import Content, bytes_in

BOMS = {  # marks at the beginning of texts in other encodings; that of UTF-32 begins like that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
NOT_IN_LATIN1 = bytes(range(0x80, 0xA0))  # letters of Windows that are not in Latin-1, such as €
SAMPLED_BYTES = 1000  # bytes by which the encoding of a text is guessed


def text_of(content: Content, name: str, title: str) -> str:
    """The text of a file of a set. Raises UsageError with the first byte that is not UTF-8, its line, and the
    command that converts the file; MissingError if it cannot be read."""
    data = bytes_in(content)
    try:
        text = data.decode("utf-8-sig")
        at = data.find(b"\0")  # as in binary files, and in UTF-16
    except UnicodeDecodeError as e:
        text, at = "", e.start
    if at < 0:
        return text
    encoding, line = _encoding_of(data), data.count(b"\n", 0, at) + 1
    probably, hint = "", "replace it, or remove it"
    if encoding:
        file = PurePosixPath(name)
        command = f"iconv -f {encoding} -t UTF-8 {shlex.quote(file.name)} > utf8{file.suffix}"
        probably, hint = f", but probably {encoding}", f"save it as UTF-8, for example with `{command}`"
    message = f"`{name}` in `{title}` is not UTF-8 text{probably}: byte 0x{data[at]:02X} in line {line:,}"
    raise UsageError(message, hint=hint)


def _encoding_of(data: bytes) -> str:
    """The most likely encoding of a text that is not UTF-8, as `iconv` calls it; "" for a binary file."""
    if encoding := next((name for mark, name in BOMS.items() if data.startswith(mark)), None):
        return encoding
    sample = data[:SAMPLED_BYTES]
    for zeros, name in ((sample[1::2], "UTF-16LE"), (sample[::2], "UTF-16BE")):
        if zeros and 2 * zeros.count(0) > len(zeros) and 3 * sample.count(0) < 2 * len(sample):
            return name
    if any(byte < 32 and byte not in b"\t\n\r\f" for byte in sample):
        return ""
    return "WINDOWS-1252" if len(data.translate(None, NOT_IN_LATIN1)) < len(data) else "LATIN1"


def lines_of(text: str) -> Iterator[str]:
    """The lines of a text without their ends; other characters that divide lines, such as U+2028, stay."""
    return (line.rstrip("\n") for line in io.StringIO(text, newline=None))


def rows_of(text: str, name: str) -> list[list[str]]:
    """The rows of a table without empty ones. Cells are separated by commas, semicolons or tabs, whichever
    the first line has most of. Raises UsageError for a text that is no table."""
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=delimiter)
    try:
        return [row for row in reader if row]
    except csv.Error as e:
        message = f"`{name}` is not a table: {e} in line {reader.line_num:,}"
        raise UsageError(message, hint="repair it, or remove it") from e
