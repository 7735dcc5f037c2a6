"""`make reference` draws docs/pictures/ as SVG: the attentions on a grid, their shapes, the choice of a model.

Pictures have a background of their own, so that they read in light and dark pages alike.
"""

from collections.abc import Callable, Iterator
from html import escape
from typing import Final

from training.variants import Variant, parse_variant

GRID = (6, 6)
"""Patches of the pictures: in both directions the same, and no multiple of L-SRA's R, so that its runs wrap."""
_CELL = 22
_PALETTE = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#eeca3b", "#9d755d", "#ff9da6")
_INK, _QUIET, _LINE = "#1f2933", "#5f6b7a", "#c3cad3"

_MEASURED = (
    (200, "cifar100-full-mha", 87.5, 59.92, (("full-mha", 100, 0),)),
    (200, "cifar100, the family", 99.9, 59.83, (("full-mha", 72, 0), ("full-mha-int8", 27, 1), ("lsra-r4", 1, 2))),
    (400, "cifar100-full-mha", 41.8, 59.92, (("full-mha", 100, 0),)),
    (
        400,
        "cifar100, the family",
        97.2,
        56.89,
        (("full-mha", 2, 0), ("full-mha-int8", 45, 1), ("lsra-r4", 47, 2), ("lsra-r4-int8", 5, 4)),
    ),
)
"""Arrivals a second, what was asked for, % in time, mean top-1, and the models that answered with shares and colours:
docs/results.md, "A step overload"."""


def attentions() -> str:
    """What keys and values see of a grid of patches: the same number of queries, fewer and fewer keys."""
    parts = [_text(20, 30, "Queries: all 36 patches, in every variant. Keys and values:", size=16, bold=True)]
    names = ("mha", "lsra-r4", "csra-r2")
    told = (
        ("MHA", "every patch by itself"),
        ("L-SRA, R = 4", "runs of 4 patches in reading order,", "which wrap at the end of a row"),
        ("C-SRA, R = 2", "windows of 3×3 patches, 2 apart,", "which share a row or a column"),
    )
    for column, (name, (title, *lines)) in enumerate(zip(names, told, strict=True)):
        left, variant = 20 + column * 270, parse_variant(name)
        parts.append(_text(left, 62, title, size=15, bold=True))
        parts += [_text(left, 80 + 17 * row, line, size=13, colour=_QUIET) for row, line in enumerate(lines)]
        parts += _patches(left, 112, variant)
        top = 112 + GRID[0] * _CELL + 26
        parts.append(_text(left, top, f"{variant.kv_tokens(GRID)} keys and values", size=14, bold=True))
        parts += _tokens(left, top + 10, variant.kv_tokens(GRID))
    return _svg(830, 330, parts)


def shapes() -> str:
    """The path of an attention layer, MHA above and the compressed frame below, with the shape of each tensor."""
    parts = [_text(20, 30, "One layer, N patches of width D, r « D, M keys and values", size=16, bold=True)]
    rows = (
        (60, "MHA", (("X", "N × D"), ("Q, K, V", "3 · N × D"), ("softmax(QKᵀ/√d)", "N × N per head"), ("Y", "N × D"))),
        (
            160,
            "L-SRA, C-SRA",
            (
                ("X", "N × D"), ("C = X·Wc", "N × r"), ("reduce, norm", "M × r"), ("K, V", "2 · M × D"),
                ("softmax(QKᵀ/√d)", "N × M per head"), ("Y", "N × D"),
            ),
        ),
    )  # fmt: skip
    for top, title, boxes in rows:
        parts.append(_text(20, top + 8, title, size=14, bold=True))
        width = 128 if len(boxes) > 4 else 150
        for index, (name, shape) in enumerate(boxes):
            left = 20 + index * (width + 18)
            fill = "#fff3e0" if name == "reduce, norm" else "#eef3f9"
            parts += [
                f'<rect x="{left}" y="{top + 16}" width="{width}" height="46" rx="5" fill="{fill}" stroke="{_LINE}"/>',
                _text(left + width / 2, top + 36, name, size=13, anchor="middle"),
                _text(left + width / 2, top + 53, shape, size=12, colour=_QUIET, anchor="middle"),
            ]
            if index:
                parts.append(_text(left - 9, top + 44, "→", size=15, colour=_QUIET, anchor="middle"))
    told = "The queries Q = X·Wq, N × D, are the same in all. Only “reduce” differs between L-SRA and C-SRA."
    parts.append(_text(20, 250, told, size=13))
    return _svg(900, 270, parts)


def choice() -> str:
    """A step overload: what a fixed model and its family answered in time, and which models answered."""
    parts = [
        _text(20, 30, "Deadline 250 ms: one model, and a family that chooses for each request", size=16, bold=True),
        _text(
            20,
            50,
            "CIFAR-100 images, one core for the service; arrivals rise from 200 to 400 a second",
            size=13,
            colour=_QUIET,
        ),
    ]
    for row, (rate, asked, in_time, top1, answered) in enumerate(_MEASURED):
        top = 72 + 52 * row + 14 * (row // 2)
        parts.append(_text(20, top + 14, f"{rate}/s", size=13, bold=True))
        parts.append(_text(20, top + 31, asked, size=13))
        left, full = 180.0, 480
        parts.append(f'<rect x="{left}" y="{top}" width="{full}" height="34" fill="#f3f4f6" stroke="{_LINE}"/>')
        for name, share, colour in answered:
            width = full * in_time / 100 * share / 100
            parts.append(f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="34" fill="{_PALETTE[colour]}"/>')
            if width > 60:
                parts.append(_text(left + width / 2, top + 22, name, size=13, colour="#ffffff", anchor="middle"))
            left += width
        parts.append(_text(674, top + 14, f"{in_time:g} % in time", size=13, bold=True))
        parts.append(_text(674, top + 31, f"mean top-1 {top1:.2f} %", size=13))
    parts.append(_text(20, 312, "Grey: refused at once with 429. Red: lsra-r4-int8.", size=13, colour=_QUIET))
    parts.append(
        _text(20, 330, "Measured, commit 6e318c01: docs/results.md, “A step overload”.", size=13, colour=_QUIET)
    )
    return _svg(830, 346, parts)


PICTURES: Final[dict[str, Callable[[], str]]] = {
    "attentions.svg": attentions,
    "shapes.svg": shapes,
    "choice.svg": choice,
}


def _patches(left: int, top: int, variant: Variant) -> Iterator[str]:
    height, width = GRID
    for patch in range(height * width):
        y, x = divmod(patch, width)
        seen = patch // (variant.reduction if variant.kind == "lsra" else 1) if variant.kind != "csra" else -1
        fill = "#f3f4f6" if seen < 0 else _PALETTE[seen % len(_PALETTE)]
        yield (
            f'<rect x="{left + x * _CELL}" y="{top + y * _CELL}" width="{_CELL}" height="{_CELL}" fill="{fill}" '
            'fill-opacity="0.75" stroke="#ffffff" stroke-width="2"/>'
        )
    if variant.kind != "csra":
        return
    per_row = -(-width // variant.reduction)
    for window in range(variant.kv_tokens(GRID)):
        centre = [variant.reduction * part for part in divmod(window, per_row)]
        # The middle of a window lies on every R-th patch; what is outside the grid is padding.
        first, last = [max(part - 1, 0) for part in centre], [part + 2 for part in centre]
        y, x = (top + first[0] * _CELL + 2, left + first[1] * _CELL + 2)
        size = [(last[axis] - first[axis]) * _CELL - 4 for axis in (1, 0)]
        colour = _PALETTE[window % len(_PALETTE)]
        yield (
            f'<rect x="{x}" y="{y}" width="{size[0]}" height="{size[1]}" rx="4" fill="{colour}" fill-opacity="0.22" '
            f'stroke="{colour}" stroke-width="2.5"/>'
        )


def _tokens(left: int, top: int, count: int) -> Iterator[str]:
    for token in range(count):
        row, column = divmod(token, 18)
        yield (
            f'<rect x="{left + column * 13}" y="{top + row * 13}" width="11" height="11" '
            f'fill="{_PALETTE[token % len(_PALETTE)]}" fill-opacity="0.85"/>'
        )


def _text(
    x: float, y: float, words: str, *, size: int, bold: bool = False, colour: str = _INK, anchor: str = "start"
) -> str:
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}"{weight} fill="{colour}">{escape(words)}</text>'


def _svg(width: int, height: int, parts: list[str]) -> str:
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
