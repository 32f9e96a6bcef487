"""The encoding of a text: UTF-8, or the one that its byte-order mark names."""

import codecs
from collections.abc import Iterator
from itertools import chain

from errors import UserError

# UTF-32 first: its little-endian mark begins with that of UTF-16. These codecs skip the mark.
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
START_BYTES = 4096          # enough to tell the encoding


def encoding_of(start: bytes, name: str) -> str:
    """The codec for a text that begins with `start`.

    Raises UserError for UTF-16 and UTF-32 without a mark: their byte order would be a guess.
    """
    for mark, codec in MARKS.items():
        if start.startswith(mark):
            return codec
    if _is_wide(start[:START_BYTES]):
        raise UserError(f"{name}: looks like UTF-16 or UTF-32 without a byte-order mark\n"
                        "  convert it to UTF-8, for example with iconv")
    return "utf-8"


def _is_wide(start: bytes) -> bool:
    """Whether bytes, taken by two or by four, are printable characters, half of them ASCII.

    Other binary data is not text in any encoding, but a model of bytes may learn it.
    """
    if not start or 4 * start.count(0) < len(start):
        return False
    for codec in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        text = start.decode(codec, "replace")           # the last character may be incomplete
        if (all(character.isprintable() or character.isspace() for character in text)
                and 2 * sum(map(str.isascii, text)) >= len(text)):
            return True
    return False


def utf8_blocks(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """A text as UTF-8 without a byte-order mark. Without one its bytes stay as they are."""
    first = next(blocks, b"")
    codec = encoding_of(first, name)
    if codec == "utf-8":
        yield from chain([first], blocks)
    elif codec == "utf-8-sig":
        yield from chain([first.removeprefix(codecs.BOM_UTF8)], blocks)
    else:
        decoder = codecs.getincrementaldecoder(codec)()
        try:
            for block in chain([first], blocks):
                yield decoder.decode(block).encode()
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _not_decodable(name, error) from None


def decode_text(raw: bytes, name: str) -> str:
    """A whole text, with line ends as \\n. Bytes that are not UTF-8 become lone surrogates."""
    try:
        text = raw.decode(encoding_of(raw, name), "surrogateescape")
    except UnicodeDecodeError as error:
        raise _not_decodable(name, error) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _not_decodable(name: str, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{name}: begins like {error.encoding}, but is not ({error.reason})\n"
                     "  convert it to UTF-8")
