"""Multipart forms: their files are images, their fields are options. Independent of any HTTP framework."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import BadRequest
from service.http import hints

_MAX_FIELD_BYTES = 4096
_CHUNK_BYTES = 256 * 1024
"""Bytes parsed at once: the parser holds the interpreter's lock."""


def read_form(
    body: bytes, content_type: str, *, max_images: int, max_fields: int
) -> tuple[list[bytes], dict[str, str]]:
    """The files of a form in their order, and its fields by name.

    The parser itself bounds the head of a part, to 8 lines of 4 KiB. Raises BadRequest, also for more than `max_images`
    files or `max_fields` fields, and for a field that is given twice.
    """
    try:
        boundary = parse_options_header(content_type)[1][b"boundary"]
        parts = _Parts(max_images=max_images, max_fields=max_fields)
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": parts.begin,
                "on_header_begin": parts.begin_header,
                "on_header_field": parts.header_name,
                "on_header_value": parts.header_value,
                "on_header_end": parts.end_header,
                "on_headers_finished": parts.end_head,
                "on_part_data": parts.data,
                "on_part_end": parts.end,
                "on_end": parts.end_form,
            },
        )
        for start in range(0, len(body), _CHUNK_BYTES):
            parser.write(body[start : start + _CHUNK_BYTES])
        parser.finalize()
    except KeyError as error:
        raise BadRequest(
            "malformed multipart body: its Content-Type names no boundary: let the client's library set the header"
        ) from error
    except FormParserError as error:
        raise BadRequest(f"malformed multipart body: {str(error)[:200]}") from error
    except (ValueError, UnicodeError) as error:
        raise BadRequest("malformed multipart body: its boundary or a part's head cannot be read") from error
    if not parts.ended:
        raise BadRequest("malformed multipart body: it is cut short, its last boundary is missing")
    if not parts.images:
        raise BadRequest(_no_file(parts.fields))
    return parts.images, parts.fields


class _Parts:
    """The parser's callbacks, and what they have found."""

    def __init__(self, *, max_images: int, max_fields: int) -> None:
        self._max_images, self._max_fields = max_images, max_fields
        self.images: list[bytes] = []
        self.fields: dict[str, str] = {}
        self.ended = False
        self._files = self._texts = 0
        self._header_name, self._header_value = b"", b""
        self._disposition = b""
        self._name, self._is_file, self._content = "", False, bytearray()

    def begin(self) -> None:
        self._disposition, self._content = b"", bytearray()

    def begin_header(self) -> None:
        self._header_name, self._header_value = b"", b""

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def end_header(self) -> None:
        name, value = self._header_name.lower(), self._header_value.strip().lower()
        if name == b"content-disposition":
            self._disposition = self._header_value
        elif name == b"content-transfer-encoding" and value not in (b"binary", b"8bit", b"7bit"):
            # RFC 7578 deprecates it for HTTP.
            raise BadRequest("a part has a Content-Transfer-Encoding: send an image's bytes as they are")

    def end_head(self) -> None:
        options = parse_options_header(self._disposition)[1]
        if b"name" not in options:
            raise BadRequest("malformed multipart body: a part has no Content-Disposition with a name")
        self._name, self._is_file = options[b"name"].decode("utf-8", "replace"), b"filename" in options
        self._files += self._is_file
        self._texts += not self._is_file
        if self._files > self._max_images:
            raise BadRequest(f"the form has more than {self._max_images} files, the most that a request may carry")
        if self._texts > self._max_fields:
            raise BadRequest(f"the form has more than {self._max_fields} fields")

    def data(self, data: bytes, start: int, end: int) -> None:
        self._content += data[start:end]
        if not self._is_file and len(self._content) > _MAX_FIELD_BYTES:
            raise BadRequest(
                f"the form's field {hints.shown(self._name)!r} is longer than {_MAX_FIELD_BYTES:,} bytes: an image is "
                "sent as a file, with curl -F image=@photo.jpg"
            )

    def end(self) -> None:
        content = bytes(self._content)
        if self._is_file:
            self.images.append(content)
        elif self._name in self.fields:
            raise BadRequest(f"the form's field {hints.shown(self._name)!r} is given twice")
        else:
            self.fields[self._name] = content.decode("utf-8", "replace")

    def end_form(self) -> None:
        self.ended = True


def _no_file(fields: dict[str, str]) -> str:
    for name, value in fields.items():
        if hints.is_url(value):
            return f"the form's field {hints.shown(name)!r} is a URL: {hints.NO_URL}"
    return "the multipart body has no file: send one with curl -F image=@photo.jpg (with the @)"
