"""What a file is, by its first bytes; for what is not accepted, what to send instead."""

import re
from typing import Final, Literal, get_args

Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]

FORMATS: Final[tuple[Format, ...]] = get_args(Format)
"""Formats that can be decoded."""

_MAGIC = tuple(
    (name, re.compile(pattern, re.DOTALL))
    for name, pattern in (
        # Not one whose zero bytes are gone, such as that before the length of its first segment.
        ("JPEG", rb"\xff\xd8\xff(?!\xe0\x10JFIF)"),
        ("PNG", rb"\x89PNG\r\n\x1a\n"),
        ("WEBP", rb"RIFF....WEBPVP8[ LX]"),
        ("GIF", rb"GIF8[79]a"),
        ("BMP", rb"BM"),
        ("TIFF", rb"II[*+]\0|II\0\*|MM\0[*+]|MM\*\0"),
        # The last two are those of any HEIF: its items say what is in it.
        ("AVIF", rb"....ftyp(?:avif|avis|mif1|msf1)"),
    )
)

_CONVERT = "convert it to JPEG or PNG"
_BYTES = "send the image's bytes"
_OTHERS: tuple[tuple[re.Pattern[bytes], str, str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), name, advice)
    for pattern, name, advice in (
        (rb"....ftyp(?:hei[cxms]|hev[cx])", "HEIC", _CONVERT),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL", _CONVERT),
        (rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ", "JPEG 2000", _CONVERT),
        (rb"....ftypcrx ", "a Canon raw photo", "export it as JPEG"),
        (rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ", "a video", "send a picture"),
        (rb"\0\0[\x01\x02]\0[^\0]\0", "an icon (ICO)", _CONVERT),
        (rb"8BPS\0", "a Photoshop document", _CONVERT),
        (rb"%PDF-|%!PS", "a PDF or PostScript document", "export the picture as JPEG or PNG"),
        (rb"P[1-7]\s|Pf\s|PF\s", "a Netpbm image (PPM)", _CONVERT),
        (rb"qoif", "QOI", _CONVERT),
        (rb"DDS |\x76\x2f\x31\x01|#\?RADIANCE", "a texture or an HDR image", _CONVERT),
        (rb"\xd0\xcf\x11\xe0|PK\x03\x04|Rar!|7z\xbc\xaf", "an archive or an office document", _BYTES),
        (rb"\x1f\x8b", "compressed with gzip", f"{_BYTES}, or name gzip in `Content-Encoding`"),
        (rb"\x28\xb5\x2f\xfd|BZh|\xfd7zXZ", "compressed", _BYTES),
        (rb"\s*data:[\w/+.-]*[;,]", "a data URL", f"{_BYTES}, decoded from base64"),
        (rb"\s*https?://\S", "a URL", f"{_BYTES}: this service fetches nothing"),
        (rb"\s*(?:/9j/|iVBORw0KGgo|UklGR|R0lGOD)[\w+/=\s-]*", "base64", f"{_BYTES}, decoded"),
        (rb"(?:\xef\xbb\xbf)?\s*<(?:svg|\?xml|!--)", "SVG or XML", "export the picture as PNG"),
        (rb"(?:\xef\xbb\xbf)?\s*<", "HTML", "check what was downloaded"),
        (rb"(?:\xef\xbb\xbf)?\s*[{\[]", "JSON", _BYTES),
        (
            rb"--[^\r\n]{1,70}\r?\n(?i:Content-)",
            "a multipart form",
            "name its boundary in `Content-Type`",
        ),
    )
)


def image_format(data: bytes) -> str | None:
    """One of FORMATS, or None."""
    return next((name for name, pattern in _MAGIC if pattern.match(data)), None)


def what_else(data: bytes) -> tuple[str, str] | None:
    """What a file in none of FORMATS seems to be, and what to do about it."""
    head = data[:256]
    return next(((name, advice) for pattern, name, advice in _OTHERS if pattern.match(head)), None)
