"""What `list`, `inspect` and `diff` show of bundles."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from export.kernels import kernels, sources
from service.bundle import CONTENT_FILES, Bundle, model_names, read_bundle, versions
from service.errors import BundleError
from service.manifest import Manifest


def listing(repository: Path) -> Table:
    """All versions of all models in a repository; a broken one says why. Raises BundleError for no repository."""
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
                kv_tokens(manifest),
                f"{manifest.params:,}",
                f"{manifest.accuracy.top1:.2%}" if manifest.accuracy else "–",
                f"{_size(bundle) / 1e6:.1f}",
            )
    return table


def card(bundle: Bundle) -> Table:
    """One bundle, readable."""
    manifest = bundle.manifest
    table = Table(title=f"{manifest.name}, version {bundle.version}", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _facts(manifest):
        table.add_row(f"[bold]{name}[/]", escape(value))
    table.add_row("[bold]files[/]", f"{_size(bundle) / 1e6:.1f} MB in {bundle.folder}")
    return table


def difference(one: Bundle, other: Bundle) -> Table:
    """Only what differs: manifest fields by their path, and the files by size."""
    table = Table("", f"{one.manifest.name}/{one.version}", f"{other.manifest.name}/{other.version}", box=SIMPLE_HEAD)
    first, second = (_flat(bundle.manifest.model_dump(mode="json")) for bundle in (one, other))
    for key in sorted(first | second):
        if first.get(key) != second.get(key):
            table.add_row(escape(key), *(escape(str(values.get(key, "–"))) for values in (first, second)))
    for file in CONTENT_FILES:
        contents = [(bundle.folder / file).read_bytes() for bundle in (one, other)]
        if contents[0] != contents[1]:
            table.add_row(file, *(f"{len(content):,} bytes" for content in contents))
    return table


def kernel_table(graph: onnx.ModelProto) -> tuple[Table, bool]:
    """Each kind of node and what CUDA and TensorRT say to it; and whether either lacks any."""
    counted = Counter(kernels(graph))
    table = Table("operator", "inputs", box=SIMPLE_HEAD, caption="\n".join(f"{k}: {v}" for k, v in sources().items()))
    table.add_column("nodes", justify="right")
    table.add_column("CUDA")
    table.add_column("TensorRT")
    for kernel, count in sorted(counted.items(), key=lambda item: (item[0].op, item[0].types)):
        answers = (f"[red]{escape(reason)}[/]" if reason else "yes" for reason in (kernel.cuda, kernel.tensorrt))
        table.add_row(f"{kernel.op}-{kernel.version}", ", ".join(kernel.types), str(count), *answers)
    return table, any(kernel.cuda or kernel.tensorrt for kernel in counted)


def kv_tokens(manifest: Manifest) -> str:
    """Key/value tokens out of all tokens; a dash for a model without attention."""
    attention = manifest.attention
    return f"{attention.kv_tokens} of {attention.tokens}" if attention else "–"


def model_words(manifest: Manifest) -> str:
    """Variant and key/value tokens; the architecture of a model without attention."""
    attention = manifest.attention
    return f"{attention.variant}, {kv_tokens(manifest)} K/V tokens" if attention else manifest.architecture


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    accuracy = "not known"
    if manifest.accuracy:
        known = manifest.accuracy
        accuracy = (
            f"top-1 {known.top1:.2%}, top-5 {known.top5:.2%} on {known.n:,} {known.split} images of {known.dataset}"
        )
    primitives: dict[str, int | None] = {}
    if attention := manifest.attention:
        primitives = {"stride": attention.stride, "block size": attention.block_size, "rank": attention.rank}
    size = manifest.preprocessing
    return [
        ("variant", f"{attention.variant} of {manifest.architecture}" if attention else manifest.architecture),
        ("primitives", ", ".join(f"{name} {value}" for name, value in primitives.items() if value) or "none"),
        ("K/V tokens", kv_tokens(manifest)),
        ("weights", "random" if manifest.random_weights else "trained"),
        ("accuracy", accuracy),
        ("parameters", f"{manifest.params:,}"),
        ("MACs", f"{manifest.macs / 1e6:,.1f} M per image" if manifest.macs else "unknown"),
        ("precision", manifest.precision + (f", batches of {manifest.max_batch}" if manifest.max_batch else "")),
        ("images", f"shorter side to {size.resize}, centre {size.crop} × {size.crop}, {size.interpolation}"),
        ("operators", _operators(manifest)),
        (
            "parity",
            f"on {manifest.parity.images} images at most {manifest.parity.max_abs_logit:g} in a logit from torch, "
            f"{manifest.parity.top1_flips} with another top-1; {manifest.parity.max_abs_by_batch:g} by the batch",
        ),
        ("devices", ", ".join(manifest.devices)),
        ("checkpoint", manifest.source.checkpoint_sha256),
        ("commit", manifest.source.git_commit or "not known"),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.source.exporter.items())),
    ]


def _operators(manifest: Manifest) -> str:
    counts = sorted(manifest.op_types.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count} {name}" for name, count in counts)
    return f"{sum(manifest.op_types.values())} of ai.onnx opset {manifest.opset}: {listed}"


def _size(bundle: Bundle) -> int:
    return sum((bundle.folder / file).stat().st_size for file in CONTENT_FILES)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 8:
            flat[prefix + key] = f"{len(value)} values"
        elif isinstance(value, str) and len(value) > 100:
            flat[prefix + key] = f"{len(value):,} characters, sha256 {hashlib.sha256(value.encode()).hexdigest()[:12]}"
        else:
            flat[prefix + key] = value
    return flat
