"""Any image classifier in ONNX, turned into a graph of ours: uint8 images in, logits and probabilities out.

    read        one file, with its external data, which must lie in its folder; at most 2 GB
    normalise   functions inlined, initialisers off the inputs, opset at least 18
    surround    cast, mean and deviation, NHWC -> NCHW before it; softmax or logarithm after it
    batch       dynamic, if batches give the same outputs as single images; else one image at a time

The classifier itself is not rewritten. Everything that cannot be kept is refused, and the error names it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, compose, helper, inliner, numpy_helper, version_converter
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model, uses_external_data

from export.graph import OPSETS, ExportError, plain
from export.sources import ExportSource, with_data
from service.engine import INPUT, OUTPUTS, Engine
from service.errors import EngineError
from service.host import available_cores
from service.manifest import Precision, Preprocessing
from training.folder_recipe import slug

Meaning = Literal["auto", "logits", "probabilities"]
"""What the output of a classifier is; `auto` decides from its values."""

MAX_BYTES = 2**31 - 1
"""Largest message of protobuf, and so the largest model with its weights inside."""
BATCHES = (2, 3, 8)
"""Batch sizes that must give the same outputs as single images."""
_SAME = 1e-3
"""Largest difference between batch sizes, as a share of the largest output."""
_PREFIX = "model/"
_TINY = 1e-30
"""Smaller probabilities are raised to this value: the logarithm of zero is not finite."""

Images = npt.NDArray[np.uint8]
Outputs = npt.NDArray[np.float32]
Predict = Callable[[Images], Outputs]


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A classifier as it is in its file, checked."""

    model: onnx.ModelProto
    input: str
    output: str
    layout: Literal["NCHW", "NHWC"]
    img_size: int
    num_classes: int
    meaning: Literal["logits", "probabilities"] = "logits"
    original_batch: int | None = None
    """The fixed batch size of the file; None if it takes any."""
    max_batch: int | None = None
    """1 for a graph that does not take batches."""

    @property
    def params(self) -> int:
        """Numbers in the initialisers."""
        return sum(int(np.prod(tensor.dims)) for tensor in self.model.graph.initializer)


def read_foreign(path: Path, *, img_size: int | None, output: str | None = None) -> Foreign:
    """Read and check the classifier in `path`; `img_size` is for graphs that leave height and width open.

    Raises ExportError for everything that cannot be served, by name.
    """
    model = _read(path)
    _check_domains(model)
    model = _normalised(model, path)
    source, layout, size = _image_input(model, img_size)
    chosen = _class_output(model, output)
    foreign = Foreign(
        model=model,
        input=source.name,
        output=chosen.name,
        layout=layout,
        img_size=size,
        num_classes=_static(chosen)[1] or 0,
        original_batch=_static(source)[0],
    )
    if not foreign.num_classes:
        raise ExportError(
            f"the number of classes in output {chosen.name!r} of {path} is open: export it with a fixed one"
        )
    return foreign


def original_predictor(path: Path, foreign: Foreign, mean: Sequence[float], std: Sequence[float]) -> Predict:
    """What the file itself gives for uint8 images (n,H,W,3), normalised by NumPy, one image at a time: (n,classes).

    It raises ExportError, at once or when it is called, if ONNX Runtime cannot run the file.
    """
    with _runnable(path):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # A file with a fixed batch needs that many images; here, all are the same.
    copies = foreign.original_batch or 1
    offset, scale = (np.asarray(values, dtype=np.float32) for values in (mean, std))

    def predict(images: Images) -> Outputs:
        pixels = (images.astype(np.float32) / 255 - offset) / scale
        if foreign.layout == "NCHW":
            pixels = pixels.transpose(0, 3, 1, 2)
        with _runnable(path):
            rows = [
                session.run([foreign.output], {foreign.input: np.repeat(one[np.newaxis], copies, axis=0)})[0][0]
                for one in pixels
            ]
        return np.stack(rows).reshape(len(images), -1).astype(np.float32)

    return predict


@contextmanager
def _runnable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ONNX Runtime raises classes of its own, which share only Exception
        raise ExportError(f"ONNX Runtime cannot run {path} ({str(error).splitlines()[0]})") from error


def understood(foreign: Foreign, meaning: Meaning, outputs: Outputs) -> Foreign:
    """`foreign` with the meaning of its output, judged by `outputs` (n,classes) if it is `auto`.

    Raises ExportError for outputs that are not finite, or that should be probabilities but are not.
    """
    if not np.isfinite(outputs).all():
        raise ExportError(f"output {foreign.output!r} holds NaN or infinity for real images")
    alike = bool((outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1, atol=1e-3))
    if meaning == "probabilities" and not alike:
        raise ExportError(
            f"output {foreign.output!r} holds no probabilities, but {outputs.min():.3g} to {outputs.max():.3g} "
            f"with a sum of {outputs[0].sum():.3g}: use --outputs logits"
        )
    found: Literal["logits", "probabilities"] = "probabilities" if alike else "logits"
    return replace(foreign, meaning=found if meaning == "auto" else meaning)


def surrounded(foreign: Foreign, mean: Sequence[float], std: Sequence[float]) -> onnx.ModelProto:
    """The graph of ours around `foreign`, checked: uint8 `image` in, `logits` and `probabilities` out."""
    inner = onnx.ModelProto()
    inner.CopyFrom(foreign.model)
    del inner.graph.value_info[:]
    _set_batch(inner)
    inner = compose.add_prefix(inner, _PREFIX)
    offset, scale = (np.asarray(values, dtype=np.float32) * 255 for values in (mean, std))
    prepared = _PREFIX + foreign.input
    before = [
        helper.make_node("Cast", [INPUT], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["pixels", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normalised" if foreign.layout == "NCHW" else prepared]),
    ]
    if foreign.layout == "NCHW":
        before.append(helper.make_node("Transpose", ["normalised"], [prepared], perm=[0, 3, 1, 2]))
    rows = numpy_helper.from_array(np.array([-1, foreign.num_classes], dtype=np.int64), "rows")
    after = [helper.make_node("Reshape", [_PREFIX + foreign.output, "rows"], ["scores"])]
    logits, probabilities = OUTPUTS
    constants = [numpy_helper.from_array(offset, "mean"), numpy_helper.from_array(scale, "std"), rows]
    if foreign.meaning == "logits":
        after += [
            helper.make_node("Identity", ["scores"], [logits]),
            helper.make_node("Softmax", ["scores"], [probabilities], axis=-1),
        ]
    else:
        constants.append(numpy_helper.from_array(np.array(_TINY, dtype=np.float32), "tiny"))
        after += [
            helper.make_node("Max", ["scores", "tiny"], ["positive"]),
            helper.make_node("Log", ["positive"], [logits]),
            helper.make_node("Identity", ["scores"], [probabilities]),
        ]
    size, classes = foreign.img_size, foreign.num_classes
    graph = helper.make_graph(
        [*before, *inner.graph.node, *after],
        "classifier",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", size, size, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes]) for name in OUTPUTS],
        [*inner.graph.initializer, *constants],
    )
    graph.sparse_initializer.extend(inner.graph.sparse_initializer)
    graph.quantization_annotation.extend(inner.graph.quantization_annotation)
    opset = next(entry.version for entry in inner.opset_import if entry.domain in _STANDARD)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=inner.ir_version)
    for node in model.graph.node:
        if node.domain == "ai.onnx":
            node.domain = ""
    return plain(model)


def with_batches(foreign: Foreign, mean: Sequence[float], std: Sequence[float], images: Images) -> Foreign:
    """`foreign` as it is if batches of `images` give the same outputs as single images; else limited to one."""
    try:
        engine = Engine(surrounded(foreign, mean, std).SerializeToString(), threads=available_cores())
        alone = np.concatenate([engine.run(images[row : row + 1])[0] for row in range(len(images))])
        scale = max(1.0, float(np.abs(alone).max()))
        for size in BATCHES:
            if np.abs(engine.run(images[:size])[0] - alone[:size]).max() > _SAME * scale:
                return replace(foreign, max_batch=1)
    except (EngineError, ExportError, ValueError) as error:
        if (foreign.original_batch or 1) > 1:
            raise ExportError(
                f"the graph takes {foreign.original_batch} images at a time only: export it for one"
            ) from error
        return replace(foreign, max_batch=1)
    return foreign


_IR_VERSION = 8
_STANDARD = ("", "ai.onnx")


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ExportError(f"{path} is not a file")
    _check_size(path.stat().st_size, path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # onnx raises classes of protobuf, which share only Exception
        raise ExportError(f"{path} is not an ONNX file ({error})") from error
    if not model.graph.node:
        raise ExportError(f"{path} is not an ONNX file: it has no graph")
    total = path.stat().st_size
    for tensor in _tensors(model):
        if uses_external_data(tensor):
            total += _external_bytes(tensor, path)
    _check_size(total, path)
    try:
        load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise ExportError(f"the external data of {path} cannot be read ({error})") from error
    return model


def _check_size(size: int, path: Path) -> None:
    if size > MAX_BYTES:
        raise ExportError(f"{path} has {size / 1e9:.1f} GB with its weights: at most 2 GB fit into one ONNX file")


def _external_bytes(tensor: TensorProto, path: Path) -> int:
    """Size of a tensor's data in another file. Raises ExportError unless that file lies in the model's folder."""
    location = ExternalDataInfo(tensor).location
    folder = path.parent.resolve()
    file = folder / location
    if Path(location).is_absolute() or not file.resolve().is_relative_to(folder) or file.is_symlink():
        raise ExportError(f"{path} takes weights from {location!r}, outside its folder: put that file beside the model")
    if not file.is_file():
        raise ExportError(f"{path} takes weights from {location!r}, which is missing: put that file beside the model")
    return ExternalDataInfo(tensor).length or file.stat().st_size


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Initialisers and constants, including those of functions and subgraphs."""
    for graph in _graphs(model.graph):
        yield from graph.initializer
        yield from _constants(graph.node)
    for function in model.functions:
        yield from _constants(function.node)


def _constants(nodes: Iterable[onnx.NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(inner)


def _check_domains(model: onnx.ModelProto) -> None:
    own = {(function.domain, function.name) for function in model.functions}
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    foreign = {
        f"{n.domain}::{n.op_type}" for n in nodes if n.domain not in _STANDARD and (n.domain, n.op_type) not in own
    }
    if foreign:
        raise ExportError(
            f"the graph has operators outside the ONNX standard: {', '.join(sorted(foreign))}: export it again without "
            "them; the service loads no operator libraries"
        )


def _normalised(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model without functions, and without initialisers among the inputs, at an opset of at least 18."""
    try:
        if model.functions:
            model = inliner.inline_local_functions(model)
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in weights]
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        # Before version 4, initialisers had to be inputs.
        model.ir_version = max(model.ir_version, _IR_VERSION)
        opset = next((entry.version for entry in model.opset_import if entry.domain in _STANDARD), 1)
        if opset < OPSETS[0]:
            model = version_converter.convert_version(model, OPSETS[0])
    except Exception as error:
        raise ExportError(f"{path} cannot be converted to opset {OPSETS[0]} ({error})") from error
    kept = [entry for entry in model.opset_import if entry.domain in _STANDARD]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model


def _image_input(
    model: onnx.ModelProto, img_size: int | None
) -> tuple[onnx.ValueInfoProto, Literal["NCHW", "NHWC"], int]:
    inputs = list(model.graph.input)
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise ExportError(f"the graph has {len(inputs)} inputs ({names}), but a classifier of images has one")
    shape = _static(inputs[0])
    layout: Literal["NCHW", "NHWC"]
    if len(shape) == 4 and shape[1] == 3:
        layout, sides = "NCHW", shape[2:]
    elif len(shape) == 4 and shape[3] == 3:
        layout, sides = "NHWC", shape[1:3]
    else:
        raise ExportError(
            f"input {inputs[0].name!r} has shape {_shown(shape)}, which is no image: wanted [batch, 3, H, W] or "
            "[batch, H, W, 3]"
        )
    if (datatype := inputs[0].type.tensor_type.elem_type) != TensorProto.FLOAT:
        raise ExportError(
            f"input {inputs[0].name!r} holds {TensorProto.DataType.Name(datatype)}, not FLOAT: export it in float32"
        )
    known = {side for side in sides if side}
    if len(known) > 1:
        raise ExportError(
            f"input {inputs[0].name!r} takes images of {sides[1]} × {sides[0]}: only square ones are served"
        )
    size = known.pop() if known else img_size
    if size is None:
        raise ExportError(f"input {inputs[0].name!r} leaves the size of images open: name it with --crop")
    if img_size not in (None, size):
        raise ExportError(f"input {inputs[0].name!r} takes images of {size} px, but --crop is {img_size}")
    dims = inputs[0].type.tensor_type.shape.dim
    for place in (2, 3) if layout == "NCHW" else (1, 2):
        dims[place].dim_value = size
    return inputs[0], layout, size


def _class_output(model: onnx.ModelProto, name: str | None) -> onnx.ValueInfoProto:
    """The output with a row of numbers for each image."""
    outputs = list(model.graph.output)
    if name is not None:
        outputs = [value for value in outputs if value.name == name]
        if not outputs:
            raise ExportError(f"no output {name!r}, but {', '.join(value.name for value in model.graph.output)}")
    inferred = {value.name: value for value in _inferred(model).graph.output}
    candidates = []
    for value in outputs:
        shaped = value if len(_static(value)) > 1 and _static(value)[1] else inferred.get(value.name, value)
        shape = _static(shaped)
        # Some models keep height and width of 1 after pooling.
        if len(shape) >= 2 and all(side == 1 for side in shape[2:]):
            squeezed = onnx.ValueInfoProto()
            squeezed.CopyFrom(shaped)
            del squeezed.type.tensor_type.shape.dim[2:]
            candidates.append(squeezed)
    if len(candidates) != 1:
        shapes = ", ".join(f"{value.name} {_shown(_static(value))}" for value in outputs)
        raise ExportError(
            f"{len(candidates)} of the outputs ({shapes}) have the shape [batch, classes]: name one with --output"
            if candidates
            else f"none of the outputs ({shapes}) has the shape [batch, classes]"
        )
    return candidates[0]


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model)
    except Exception:  # noqa: BLE001 (shapes are only wanted where the file does not state them)
        return model


def _set_batch(model: onnx.ModelProto) -> None:
    """Declare the batch of input and outputs as dynamic."""
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = "batch"


def _static(value: onnx.ValueInfoProto) -> list[int | None]:
    """Sizes by dimension; None where one is open."""
    return [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]


def _shown(shape: list[int | None]) -> str:
    return "[" + ", ".join("?" if side is None else str(side) for side in shape) + "]"


@dataclass(frozen=True, kw_only=True)
class OnnxSource(ExportSource):
    """A classifier from another exporter's file."""

    foreign: Foreign
    original: Predict

    def predict(self, images: Images) -> tuple[Outputs, Outputs]:
        """Run the file itself in ONNX Runtime."""
        scores = self.original(images)
        if self.foreign.meaning == "probabilities":
            return np.log(np.maximum(scores, _TINY)), scores
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        return scores, powers / powers.sum(axis=1, keepdims=True)

    def graph(self, precision: Precision, *, opset: int) -> onnx.ModelProto:  # noqa: ARG002 (the file has its own)
        """The file's graph, surrounded. Raises ExportError for fp16."""
        if precision == "fp16":
            raise ExportError("a graph of another exporter is not converted to fp16: export it so where it was trained")
        return surrounded(self.foreign, self.preprocessing.mean, self.preprocessing.std)


def onnx_source(
    path: Path,
    preprocessing: Callable[[int], Preprocessing],
    *,
    crop: int | None,
    labels: tuple[str, ...],
    family: str,
    meaning: Meaning = "auto",
    output: str | None = None,
    data: str | None = None,
) -> ExportSource:
    """The classifier in the file `path`.

    `preprocessing` is called with the side of its images, which `crop` sets if the graph leaves it open.
    Raises ExportError for everything that cannot be served, by name.
    """
    foreign = read_foreign(path, img_size=crop, output=output)
    if len(labels) != foreign.num_classes:
        raise ExportError(f"{path} has {foreign.num_classes} classes, but there are {len(labels)} labels")
    prepared = preprocessing(foreign.img_size)
    original = original_predictor(path, foreign, prepared.mean, prepared.std)
    source = OnnxSource(
        family=family,
        model=slug(path.stem, otherwise="model"),
        architecture=path.stem,
        params=foreign.params,
        preprocessing=prepared,
        labels=labels,
        weights_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        foreign=foreign,
        original=original,
    )
    seen = with_data(source, data)
    noise = replace(source, dataset=None).test_images(max(BATCHES))
    images = np.concatenate([seen.test_images(max(BATCHES)), noise])[: max(BATCHES)]
    foreign = understood(foreign, meaning, original(images))
    foreign = with_batches(foreign, prepared.mean, prepared.std, images)
    return replace(seen, foreign=foreign, max_batch=foreign.max_batch)
