"""Tables that describe bundles: for `list`, `inspect`, `diff` and `kernels`."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from export.kernels import kernels, sources
from service.bundle import CONTENT_FILES, Bundle, model_names, read_bundle, versions
from service.errors import BundleError
from service.manifest import Attention, Manifest


def listing(repository: Path) -> Table:
    """One row per version of each model; a broken one shows its error. Raises BundleError without a repository."""
    table = Table("model", "version", "precision", "weights", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("K/V tokens", "parameters", "top-1", "MB"):
        table.add_column(column, justify="right")
    for name in model_names(repository):
        for version in versions(repository, name):
            try:
                bundle = read_bundle(repository / name / str(version))
            except BundleError as error:
                table.add_row(name, str(version), f"[red]broken:[/] {escape(str(error))}")
                continue
            manifest = bundle.manifest
            table.add_row(
                name,
                str(version),
                manifest.precision,
                "random" if manifest.random_weights else "trained",
                kv_tokens(manifest.attention),
                f"{manifest.params:,}",
                f"{manifest.accuracy.top1:.2%}" if manifest.accuracy else "–",
                f"{_size(bundle) / 1e6:.1f}",
            )
    return table


def card(bundle: Bundle) -> Table:
    """All facts about one bundle."""
    manifest = bundle.manifest
    table = Table(title=f"{manifest.name}, version {bundle.version}", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _facts(manifest):
        table.add_row(f"[bold]{name}[/]", escape(value))
    table.add_row("[bold]files[/]", f"{_size(bundle) / 1e6:.1f} MB in {bundle.folder}")
    return table


def difference(one: Bundle, other: Bundle) -> Table:
    """One row per manifest field, by its path, and per file that differs; no rows for equal bundles."""
    table = Table("", f"{one.manifest.name}/{one.version}", f"{other.manifest.name}/{other.version}", box=SIMPLE_HEAD)
    first, second = (_flat(bundle.manifest.model_dump(mode="json")) for bundle in (one, other))
    for key in sorted(first | second):
        if first.get(key) != second.get(key):
            table.add_row(escape(key), *(escape(_shortened(values.get(key, "–"))) for values in (first, second)))
    for file in CONTENT_FILES:
        contents = [(bundle.folder / file).read_bytes() for bundle in (one, other)]
        if contents[0] != contents[1]:
            table.add_row(file, *(f"{len(content):,} bytes" for content in contents))
    return table


def kernel_table(graph: onnx.ModelProto) -> tuple[Table, bool]:
    """One row per kind of node with its support by CUDA and TensorRT; and whether either lacks a kernel."""
    counted = Counter(kernels(graph))
    table = Table("operator", "inputs", box=SIMPLE_HEAD, caption="\n".join(f"{k}: {v}" for k, v in sources().items()))
    table.add_column("nodes", justify="right")
    table.add_column("CUDA")
    table.add_column("TensorRT")
    for kernel, count in sorted(counted.items(), key=lambda item: (item[0].op, item[0].types)):
        support = (f"[red]{escape(reason)}[/]" if reason else "yes" for reason in (kernel.cuda, kernel.tensorrt))
        table.add_row(f"{kernel.op}-{kernel.version}", ", ".join(kernel.types), str(count), *support)
    return table, any(kernel.cuda or kernel.tensorrt for kernel in counted)


def summary(bundle: Bundle) -> str:
    """One bundle in a line."""
    manifest, attention = bundle.manifest, bundle.manifest.attention
    variant = f"{attention.variant}, {kv_tokens(manifest.attention)} K/V tokens" if attention else manifest.architecture
    accuracy = f"top-1 {manifest.accuracy.top1:.2%}, " if manifest.accuracy else ""
    limit = f"batches of at most {manifest.max_batch}, " if manifest.max_batch else ""
    return (
        f"{bundle.folder}: {variant}, {manifest.params:,} parameters, {manifest.precision}, "
        f"{bundle.model_path.stat().st_size / 1e6:.1f} MB, {accuracy}{limit}"
        f"largest difference from the original {manifest.parity.max_abs_logit:g} in a logit on "
        f"{manifest.parity.images} images"
    )


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    accuracy, attention = "unknown", manifest.attention
    if manifest.accuracy:
        known = manifest.accuracy
        accuracy = (
            f"top-1 {known.top1:.2%}, top-5 {known.top5:.2%} on {known.n:,} {known.split} images of {known.dataset}"
        )
    primitives = attention.model_dump(include={"stride", "block_size", "rank"}, exclude_none=True) if attention else {}
    size, parity = manifest.preprocessing, manifest.parity
    return [
        ("variant", f"{attention.variant} of {manifest.architecture}" if attention else manifest.architecture),
        ("primitives", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in primitives.items()) or "none"),
        ("K/V tokens", kv_tokens(manifest.attention)),
        ("weights", "random" if manifest.random_weights else "trained"),
        ("accuracy", accuracy),
        ("parameters", f"{manifest.params:,}"),
        ("MACs", f"{manifest.macs / 1e6:,.1f} M per image" if manifest.macs else "unknown"),
        ("precision", manifest.precision + (f", batches of {manifest.max_batch}" if manifest.max_batch else "")),
        ("images", f"shorter side to {size.resize}, centre {size.crop} × {size.crop}, {size.interpolation}"),
        ("operators", _operators(manifest)),
        (
            "parity",
            f"on {parity.images} images at most {parity.max_abs_logit:g} in a logit from the original, "
            f"{parity.top1_flips} with another top-1; {parity.max_abs_by_batch:g} between batch sizes",
        ),
        ("devices", ", ".join(manifest.devices)),
        ("checkpoint", manifest.source.checkpoint_sha256),
        ("commit", manifest.source.git_commit or "unknown"),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.source.exporter.items())),
    ]


def kv_tokens(attention: Attention | None) -> str:
    """Key/value tokens out of all tokens; a dash without attention."""
    return f"{attention.kv_tokens} of {attention.tokens}" if attention else "–"


def _operators(manifest: Manifest) -> str:
    counts = sorted(manifest.op_types.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count} {name}" for name, count in counts)
    return f"{sum(manifest.op_types.values())} of ai.onnx opset {manifest.opset}: {listed}"


def _size(bundle: Bundle) -> int:
    return sum((bundle.folder / file).stat().st_size for file in CONTENT_FILES)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _shortened(value: Any) -> str:
    """`value` as text that fits a column; longer text is identified by its digest."""
    text = str(value)
    return (
        text
        if len(text) <= 80
        else f"{len(text):,} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    )
