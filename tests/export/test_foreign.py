"""Classifiers in ONNX from other exporters: what is taken in, and what is refused by name."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner

from export.__main__ import app
from export.foreign import read_foreign
from export.graph import ExportError
from service.bundle import read_bundle
from service.engine import Engine

CLASSES = 5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZE = 16


def weight(*shape: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1, size=shape).astype(np.float32)


def classifier(
    *,
    shape: Sequence[int | str] = ("batch", 3, SIZE, SIZE),
    opset: int = 17,
    softmax: bool = False,
    reshape_to: Sequence[int] | None = None,
    classes: int = CLASSES,
    element_type: int = TensorProto.FLOAT,
    changes: Callable[[onnx.GraphProto], None] = lambda _: None,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """Convolution, pooling, product: NCHW or NHWC by `shape`. `reshape_to` fixes the batch inside the graph."""
    nhwc = shape[3] == 3
    nodes = [helper.make_node("Transpose", ["x"], ["nchw"], perm=[0, 3, 1, 2])] if nhwc else []
    nodes += [
        helper.make_node("Conv", ["nchw" if nhwc else "x", "kernel"], ["c"], kernel_shape=[3, 3], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Reshape", ["p", "rows"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head", "bias"], ["scores" if softmax else "y"]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["scores"], ["y"], axis=-1))
    numbers = {"kernel": weight(8, 3, 3, 3), "head": weight(8, classes, seed=1), "bias": weight(classes, seed=2)}
    dtype = np.float16 if element_type == TensorProto.FLOAT16 else np.float32
    weights = [numpy_helper.from_array(values.astype(dtype), name) for name, values in numbers.items()]
    weights.append(numpy_helper.from_array(np.array(reshape_to or (-1, 8), dtype=np.int64), "rows"))
    graph = helper.make_graph(
        nodes,
        "someone-elses",
        [helper.make_tensor_value_info("x", element_type, list(shape))],
        [helper.make_tensor_value_info("y", element_type, [shape[0], classes])],
        weights,
    )
    changes(graph)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def labels(folder: Path, count: int = CLASSES) -> Path:
    path = folder / "labels.txt"
    path.write_text("".join(f"class {number}\n" for number in range(count)))
    return path


def arguments(file: Path, *more: str, count: int = CLASSES) -> list[str]:
    folder = file.parent
    normalisation = ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD))]
    named = ["--labels", str(labels(folder, count)), "--family", "mine", "--repository", str(folder / "models")]
    return ["onnx", str(file), *named, *(normalisation if "--preprocessing" not in more else []), *more]


def exported(model: onnx.ModelProto, folder: Path, *more: str) -> Path:
    """Write `model` as net.onnx, export it, and return its bundle."""
    onnx.save(model, folder / "net.onnx")
    result = CliRunner().invoke(app, arguments(folder / "net.onnx", *more))
    assert result.exit_code == 0, result.output
    return folder / "models" / "mine-net" / "1"


def images(count: int, size: int = SIZE) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, size=(count, size, size, 3), dtype=np.uint8)


def by_hand(model: onnx.ModelProto, pixels: npt.NDArray[np.uint8], *, nhwc: bool = False) -> npt.NDArray[np.float32]:
    """The model's own outputs in ONNX Runtime for images normalised by NumPy, one by one."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    prepared = (pixels.astype(np.float32) / 255 - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32)
    prepared = prepared if nhwc else prepared.transpose(0, 3, 1, 2)
    return np.concatenate([session.run(None, {"x": prepared[i : i + 1]})[0] for i in range(len(pixels))]).astype(
        np.float32
    )


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("NCHW", {}),
        ("NHWC", {"shape": ("batch", SIZE, SIZE, 3)}),
        ("an old opset", {"opset": 9}),
        ("a newer opset", {"opset": 21}),
        ("a fixed batch that can be any", {"shape": (1, 3, SIZE, SIZE)}),
    ],
)
def test_outputs_are_those_of_the_file(tmp_path: Path, form: str, options: dict[str, Any]) -> None:
    model = classifier(**options)
    bundle = read_bundle(exported(model, tmp_path))
    manifest = bundle.manifest
    assert manifest.opset >= 18
    assert (manifest.max_batch, manifest.attention, manifest.architecture) == (None, None, "net")
    assert bundle.labels[0] == "class 0"
    logits, probabilities = Engine(bundle.model_path).run(images(6))
    expected = by_hand(model, images(6), nhwc=form == "NHWC")
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(probabilities, powers / powers.sum(axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("outputs", ["auto", "probabilities"])
def test_probabilities_stay_what_they_are(tmp_path: Path, outputs: str) -> None:
    model = classifier(softmax=True)
    bundle = read_bundle(exported(model, tmp_path, "--outputs", outputs))
    logits, probabilities = Engine(bundle.model_path).run(images(4))
    expected = by_hand(model, images(4))
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(logits, np.log(np.maximum(expected, 1e-30)), atol=1e-4)


def test_a_graph_that_takes_no_batches_is_limited_to_one_image(tmp_path: Path) -> None:
    model = classifier(shape=(1, 3, SIZE, SIZE), reshape_to=(1, 8))
    bundle = read_bundle(exported(model, tmp_path))
    assert bundle.manifest.max_batch == 1
    logits, _ = Engine(bundle.model_path).run(images(1))
    np.testing.assert_allclose(logits, by_hand(model, images(1)), atol=1e-5)


def test_a_graph_whose_batches_give_other_outputs_is_limited_to_one_image(tmp_path: Path) -> None:
    def mix(graph: onnx.GraphProto) -> None:
        """Add the mean over the batch to every image."""
        graph.node[-1].output[0] = "own"
        graph.node.append(helper.make_node("ReduceMean", ["own"], ["mean"], axes=[0], keepdims=1))
        graph.node.append(helper.make_node("Add", ["own", "mean"], ["y"]))

    assert read_bundle(exported(classifier(changes=mix), tmp_path)).manifest.max_batch == 1


def test_open_height_and_width_are_set_by_crop(tmp_path: Path) -> None:
    model = classifier(shape=("batch", 3, "height", "width"))
    bundle = read_bundle(exported(model, tmp_path, "--crop", "24", "--resize", "32"))
    assert bundle.manifest.input.shape == (-1, 24, 24, 3)
    assert (bundle.manifest.preprocessing.resize, bundle.manifest.preprocessing.crop) == (32, 24)


def test_initialisers_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    def old_style(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))

    model = classifier(changes=old_style, opset=9)
    model.ir_version = 3
    bundle = read_bundle(exported(model, tmp_path))
    np.testing.assert_allclose(Engine(bundle.model_path).run(images(3))[0], by_hand(model, images(3)), atol=1e-5)


def test_external_data_is_taken_in(tmp_path: Path) -> None:
    model = classifier()
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=64)
    result = CliRunner().invoke(app, arguments(tmp_path / "net.onnx"))
    assert result.exit_code == 0, result.output
    bundle = tmp_path / "models" / "mine-net" / "1"
    (tmp_path / "net.data").unlink()
    np.testing.assert_allclose(
        Engine(bundle / "model.onnx").run(images(3))[0], by_hand(classifier(), images(3)), atol=1e-5
    )


def pictures(folder: Path, each: int = 20) -> Path:
    """Class folders called as the labels."""
    for number, pixels in enumerate(images(CLASSES * each, 24)):
        path = folder / f"class {number % CLASSES}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def test_data_proves_the_export_measures_accuracy_and_calibrates_int8(tmp_path: Path) -> None:
    data = pictures(tmp_path / "photos")
    model = classifier()
    options = ("--data", str(data), "--resize", "24")
    manifest = read_bundle(exported(model, tmp_path, *options)).manifest
    assert manifest.accuracy is not None
    assert (manifest.accuracy.n, manifest.accuracy.split) == (CLASSES * 2, "test")
    assert manifest.parity.images == CLASSES * 2 + 3
    command = arguments(tmp_path / "net.onnx", *options, "--precision", "int8", "--accept-accuracy-loss")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    quantised = read_bundle(tmp_path / "models" / "mine-net-int8" / "1").manifest
    assert {"QuantizeLinear", "DequantizeLinear"} <= quantised.op_types.keys()
    assert quantised.accuracy is not None


def test_int8_of_a_graph_that_takes_no_batches_is_calibrated_image_by_image(tmp_path: Path) -> None:
    data = pictures(tmp_path / "photos")
    onnx.save(classifier(shape=(1, 3, SIZE, SIZE), reshape_to=(1, 8)), tmp_path / "net.onnx")
    command = arguments(tmp_path / "net.onnx", "--data", str(data), "--precision", "int8", "--accept-accuracy-loss")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "batches of at most 1" in result.stdout.replace("\n", " ")
    manifest = read_bundle(tmp_path / "models" / "mine-net-int8" / "1").manifest
    assert manifest.max_batch == 1
    assert manifest.op_types["DequantizeLinear"] >= 4, "convolution and product"


def test_a_file_of_another_name_is_the_next_version_but_another_graph_is_not(tmp_path: Path) -> None:
    exported(classifier(), tmp_path)
    onnx.save(classifier(), tmp_path / "renamed.onnx")
    again = CliRunner().invoke(app, arguments(tmp_path / "renamed.onnx", "--name", "net"))
    assert again.exit_code == 0, again.output
    larger = classifier()
    larger.graph.initializer.append(numpy_helper.from_array(weight(3), "more"))
    onnx.save(larger, tmp_path / "net.onnx")
    other = CliRunner().invoke(app, arguments(tmp_path / "net.onnx"))
    assert other.exit_code == 1
    assert "choose another name for this one with --name" in other.stderr
    for name in ("Big Net", "../../evil"):
        refused = CliRunner().invoke(app, arguments(tmp_path / "net.onnx", "--name", name))
        assert "cannot be a name" in refused.stderr


def test_a_graph_for_several_images_only_is_refused(tmp_path: Path) -> None:
    onnx.save(classifier(shape=(4, 3, SIZE, SIZE), reshape_to=(4, 8)), tmp_path / "net.onnx")
    result = CliRunner().invoke(app, arguments(tmp_path / "net.onnx"))
    assert result.exit_code == 1
    assert "takes 4 images at a time only" in result.stderr


def changed_input(name: str) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]))
        graph.node.append(helper.make_node("Add", ["y", name], ["z"]))

    return change


def second_output(graph: onnx.GraphProto) -> None:
    graph.node.append(helper.make_node("Identity", ["y"], ["again"]))
    graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, ["batch", CLASSES]))


def custom_operator(graph: onnx.GraphProto) -> None:
    graph.node[1].domain = "com.example"


def not_a_number(graph: onnx.GraphProto) -> None:
    bias = next(tensor for tensor in graph.initializer if tensor.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(CLASSES, np.nan, dtype=np.float32), "bias"))


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"changes": changed_input("mask")}, [], r"has 2 inputs \(x, mask\)"),
        ({"shape": ("batch", 1, SIZE, SIZE)}, [], r"shape \[\?, 1, 16, 16\], which is no image"),
        ({"shape": ("batch", 3, SIZE, 2 * SIZE)}, [], "32 × 16: only square ones"),
        ({"shape": ("batch", 3, "h", "w")}, [], "leaves the size of images open: name it with --crop"),
        ({"element_type": TensorProto.FLOAT16}, [], "holds FLOAT16, not FLOAT: export it in float32"),
        ({"changes": custom_operator, "domains": ["com.example"]}, [], "outside the ONNX standard: com.example::Relu"),
        ({"classes": 7}, [], "has 7 classes, but there are 5 labels"),
        ({"changes": not_a_number}, [], "holds NaN or infinity"),
        ({"changes": second_output}, [], r"2 of the outputs \(y \[\?, 5\], again \[\?, 5\]\).*--output"),
        ({}, ["--output", "nothing"], "no output 'nothing', but y"),
        ({}, ["--outputs", "probabilities"], "holds no probabilities"),
        ({}, ["--crop", "20"], "takes images of 16 px, but --crop is 20"),
        ({}, ["--resize", "12"], "--resize 12 is less than the 16 px"),
        ({}, ["--precision", "int8"], "int8 needs images to calibrate with: name a data set with --data"),
        ({}, ["--precision", "fp16"], "not converted to fp16"),
        ({}, ["--preprocessing", "timm:resnet18"], "takes images of 16 px, but timm:resnet18 of 224"),
        ({}, ["--preprocessing", "timm:resnet_of_mine"], "timm has no model 'resnet_of_mine'"),
        ({}, ["--preprocessing", "mine"], "unknown preprocessing 'mine'"),
        ({}, ["--std", "0,1,1"], "--std 0,1,1 must be positive"),
        ({}, ["--mean", "0.5"], "is not three numbers"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, options: dict[str, Any], more: list[str], message: str
) -> None:
    file = tmp_path / "net.onnx"
    model = classifier(**options)
    onnx.save(model, file)
    result = CliRunner().invoke(app, arguments(file, *more))
    assert result.exit_code == 1, result.output
    assert re.search(message, result.stderr.replace("\n", " ")), result.stderr
    assert not (tmp_path / "models").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.txt", "net.onnx"]


def test_over_two_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "huge.onnx"
    with file.open("wb") as stream:
        stream.truncate(3 * 2**30)
    with pytest.raises(ExportError, match=r"has 3\.2 GB with its weights: at most 2 GB"):
        read_foreign(file, img_size=None)
    external(classifier(), tmp_path / "net.onnx", "net.data")
    with (tmp_path / "net.data").open("r+b") as stream:
        stream.truncate(3 * 2**30)
    assert read_foreign(tmp_path / "net.onnx", img_size=None).num_classes == CLASSES, "only what is used counts"
    saved = onnx.load(tmp_path / "net.onnx", load_external_data=False)
    lengths = [entry for tensor in saved.graph.initializer for entry in tensor.external_data if entry.key == "length"]
    lengths[0].value = str(3 * 2**30)
    onnx.save(saved, tmp_path / "net.onnx")
    with pytest.raises(ExportError, match=r"has 3\.2 GB with its weights"):
        read_foreign(tmp_path / "net.onnx", img_size=None)


def external(model: onnx.ModelProto, file: Path, location: str) -> None:
    onnx.save(model, file, save_as_external_data=True, location=file.name + ".data", size_threshold=0)
    data = file.with_name(file.name + ".data")
    saved = onnx.load(file, load_external_data=False)
    for tensor in saved.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(saved, file)
    target = Path(location) if Path(location).is_absolute() else file.parent / location
    data.rename(target)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "missing"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    file = folder / "net.onnx"
    location = {"parent": "../secret.data", "absolute": str(tmp_path / "secret.data")}.get(kind, "net.data")
    external(classifier(), file, location)
    if kind == "link":
        (folder / "net.data").rename(tmp_path / "secret.data")
        (folder / "net.data").symlink_to(tmp_path / "secret.data")
    if kind == "missing":
        (folder / "net.data").unlink()
    result = CliRunner().invoke(app, arguments(file))
    assert result.exit_code == 1
    assert ("which is missing" if kind == "missing" else "outside its folder") in result.stderr
    assert not (folder / "models").exists()


def test_a_graph_that_onnx_runtime_cannot_load_is_refused(tmp_path: Path) -> None:
    def other_shape(graph: onnx.GraphProto) -> None:
        head = next(tensor for tensor in graph.initializer if tensor.name == "head")
        head.CopyFrom(numpy_helper.from_array(weight(9, CLASSES), "head"))

    onnx.save(classifier(changes=other_shape), tmp_path / "net.onnx")
    result = CliRunner().invoke(app, arguments(tmp_path / "net.onnx"))
    assert result.exit_code == 1
    assert "ONNX Runtime cannot run" in result.stderr
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07"])
def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.onnx").write_bytes(content)
    result = CliRunner().invoke(app, arguments(tmp_path / "net.onnx"))
    assert result.exit_code == 1
    assert "is not an ONNX file" in result.stderr


@pytest.mark.parametrize(("text", "message"), [("", "holds no labels"), ("a\n\nb\n", "line 2 is empty")])
def test_labels_that_cannot_be_used_are_refused(tmp_path: Path, text: str, message: str) -> None:
    onnx.save(classifier(), tmp_path / "net.onnx")
    command = arguments(tmp_path / "net.onnx")
    (tmp_path / "labels.txt").write_text(text)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert message in result.stderr


def test_classes_of_the_data_must_be_the_labels(tmp_path: Path) -> None:
    onnx.save(classifier(), tmp_path / "net.onnx")
    data = pictures(tmp_path / "photos", each=3)
    (data / "class 1").rename(data / "another")
    result = CliRunner().invoke(app, arguments(tmp_path / "net.onnx", "--data", str(data)))
    assert result.exit_code == 1
    assert "'another' is not 'class 0'" in result.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_graph_of_timms_in_another_exporters_form_is_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=CLASSES).eval()
    torch.onnx.export(
        model,
        (torch.zeros(1, 3, 64, 64),),
        tmp_path / "net.onnx",
        dynamo=False,
        opset_version=16,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
    )
    result = CliRunner().invoke(app, arguments(tmp_path / "net.onnx"))
    assert result.exit_code == 0, result.output
    bundle = read_bundle(tmp_path / "models" / "mine-net" / "1")
    assert bundle.manifest.max_batch is None
    pixels = images(5, 64)
    with torch.inference_mode():
        prepared = (torch.from_numpy(pixels).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        expected = model(prepared.permute(0, 3, 1, 2))
    np.testing.assert_allclose(Engine(bundle.model_path).run(pixels)[0], expected.numpy(), atol=1e-4)


def light_models() -> list[Path]:
    """Models of the onnx package's own tests: opset 9, a fixed batch, weights that are all equal."""
    return sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("light_*.onnx"))


@pytest.mark.parametrize("name", ["light_squeezenet", "light_shufflenet", "light_densenet121"])
def test_models_of_the_onnx_package_are_read(name: str) -> None:
    path = next(path for path in light_models() if path.stem == name)
    foreign = read_foreign(path, img_size=None)
    assert (foreign.img_size, foreign.layout, foreign.num_classes) == (224, "NCHW", 1000)


def test_the_manifest_says_which_file_it_was(tmp_path: Path) -> None:
    bundle = exported(classifier(), tmp_path)
    stated = json.loads((bundle / "manifest.json").read_text())
    assert stated["params"] == 8 * 3 * 9 + 8 * CLASSES + CLASSES + 2
    assert stated["macs"] is None
    result = CliRunner().invoke(app, ["verify", str(bundle)])
    assert result.exit_code == 0, result.output
