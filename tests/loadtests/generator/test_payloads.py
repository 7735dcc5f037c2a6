"""What is sent: real files in a seeded order with their labels, or generated JPEGs of stated sizes."""

import io
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from loadtests.generator.payloads import describe, generated, parse_sizes, read_payloads
from loadtests.generator.readers import PayloadError, state


def sent(data: Path | None) -> tuple[list[bytes], str]:
    payloads = read_payloads(data)
    return [payload.data for payload in payloads], describe(payloads, data)


def folder_of(data: Path, *names: str) -> Path:
    for name in names:
        file = data / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    return data


def write_table(file: Path, images: list[str], **columns: list[int] | list[str]) -> None:
    rows = [{"bytes": image.encode(), "path": None} for image in images]
    pq.write_table(pa.table({"img": rows, **columns}), file)


def labels_of(data: Path) -> dict[str, int | str | None]:
    return {payload.name: payload.label for payload in read_payloads(data)}


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_folder_s_images_are_all_sent_in_the_same_order_every_time(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(12):
        (data / f"{number}.jpg").write_bytes(bytes([number]) * 1000)
    (data / "notes.txt").write_text("not an image")
    (data / "._1.jpg").write_text("not an image either")
    first, what = sent(data)
    second, _ = sent(data)
    assert first == second
    assert sorted(first) == sorted(bytes([number]) * 1000 for number in range(12))
    assert first != sorted(first)
    assert "12 files of data/" in what
    assert "median 1.0 kB" in what
    assert what.endswith("unlabelled")
    assert [payload.data for payload in read_payloads(data, seed=1)] != first
    assert [payload.data for payload in read_payloads(data, limit=5)] == first[:5]
    assert [payload.data for payload in read_payloads(data, shuffle=False)][:3] == [
        (data / name).read_bytes() for name in ("0.jpg", "1.jpg", "10.jpg")
    ]


@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet_rows_are_sent_the_test_split_first(column: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        rows = [{"bytes": f"{split}{number}".encode(), "path": None} for number in range(3)]
        pq.write_table(pa.table({column: rows}), data / f"{split}-0.parquet")
    images, what = sent(data)
    assert sorted(images) == [b"test0", b"test1", b"test2"]
    assert "rows of test-0.parquet" in what


@pytest.mark.parametrize("column", ["fine_label", "label"])
def test_labels_stay_with_their_rows_over_all_files_of_the_split(column: str, tmp_path: Path) -> None:
    total = 0
    for shard, count in enumerate((300, 7, 520)):
        numbers = range(total, total + count)
        write_table(tmp_path / f"test-{shard}.parquet", [f"image {n}" for n in numbers], **{column: list(numbers)})
        total += count
    in_order = read_payloads(tmp_path, shuffle=False)
    assert [payload.label for payload in in_order] == list(range(827))
    assert (in_order[306].name, in_order[307].name) == ("test-1.parquet#6", "test-2.parquet#0")
    for payload in read_payloads(tmp_path, limit=100):
        assert payload.data == f"image {payload.label}".encode()
    assert "827 rows of test-0.parquet and 2 more" in describe(in_order, tmp_path)


def test_a_withheld_label_is_none(tmp_path: Path) -> None:
    write_table(tmp_path / "test-0.parquet", ["a", "b", "c"], label=[-1, 0, 2])
    assert [payload.label for payload in read_payloads(tmp_path, shuffle=False)] == [None, 0, 2]


def test_labels_csv_labels_files_by_index_or_by_name_and_may_leave_some_out(tmp_path: Path) -> None:
    by_index = folder_of(tmp_path / "index", "a.png", "b.png", "c.png")
    (by_index / "labels.csv").write_text("imagenet1k_index,file\n7,a.png\n,b.png\n")
    assert labels_of(by_index) == {"a.png": 7, "b.png": None, "c.png": None}
    # As `python -m training images` writes it: names that are numbers need not be the classes' places.
    (by_index / "labels.csv").write_text("file,index,label\na.png,0,7\n")
    assert labels_of(by_index)["a.png"] == 0
    by_name = folder_of(tmp_path / "name", "a.png", "b.png")
    (by_name / "labels.csv").write_text("file,label,imagenet1k_index\na.png,apple,1\nb.png,2009,2\n")
    assert labels_of(by_name) == {"a.png": "apple", "b.png": "2009"}


def test_labels_csv_that_does_not_fit_its_folder_is_an_error(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_text("file,label\na.png,1\ngone.png,2\n")
    with pytest.raises(PayloadError, match=r"names 1 files that are not in its folder, 'gone\.png' among them"):
        read_payloads(tmp_path)
    (tmp_path / "labels.csv").write_text("name,label\na.png,1\n")
    with pytest.raises(PayloadError, match=r"needs a column file, and a column index, label .* it has name, label"):
        read_payloads(tmp_path)
    (tmp_path / "labels.csv").write_bytes(b"file,label\n\xff,1\n")
    with pytest.raises(PayloadError, match=r"labels\.csv cannot be read"):
        read_payloads(tmp_path)


def test_class_folders_give_names_or_indices(tmp_path: Path) -> None:
    named = folder_of(tmp_path / "named", "cat/1.png", "cat/2.jpg", "dog/1.png", "dog/notes.txt", ".git/1.png")
    assert labels_of(named) == {"cat/1.png": "cat", "cat/2.jpg": "cat", "dog/1.png": "dog"}
    assert "3 files of 2 classes in named/" in describe(read_payloads(named), named)
    numbered = folder_of(tmp_path / "numbered", "0/1.png", "10/1.png")
    assert labels_of(numbered) == {"0/1.png": 0, "10/1.png": 10}


def test_the_mix_of_sizes_and_labels_is_said(tmp_path: Path) -> None:
    for number, size in enumerate([(8, 8), (8, 8), (8, 8), (16, 9)]):
        (tmp_path / f"{number}.png").write_bytes(png(*size))
    (tmp_path / "labels.csv").write_text("file,label\n0.png,3\n")
    said = describe(read_payloads(tmp_path), tmp_path)
    assert "75 % 8×8, 25 % 16×9" in said
    assert said.endswith("1 of them labelled")
    (tmp_path / "broken.png").write_bytes(b"")
    for side in range(20, 30):
        (tmp_path / f"{side}.png").write_bytes(png(side, side))
    said = describe(read_payloads(tmp_path), tmp_path)
    assert "12 sizes from 8×8 to 29×29 pixels, median 23×23" in said
    assert "1 with no readable header" in said


def test_without_data_jpegs_of_about_100_kb_are_generated(tmp_path: Path) -> None:
    images, what = sent(None)
    assert "64 generated JPEGs, 640×480 pixels" in what
    assert len(set(images)) == 64
    assert all(60_000 < len(image) < 160_000 for image in images)
    assert Image.open(io.BytesIO(images[0])).size == (640, 480)


def test_generated_jpegs_have_the_sizes_that_were_asked_for(tmp_path: Path) -> None:
    payloads = read_payloads(None, sizes=parse_sizes("33x20:3,1x1:1"))
    sizes = Counter(Image.open(io.BytesIO(payload.data)).size for payload in payloads)
    assert sizes == {(33, 20): 48, (1, 1): 16}
    assert "75 % 33×20, 25 % 1×1" in describe(payloads, None)
    assert payloads == read_payloads(None, sizes=parse_sizes("33x20:3,1x1:1"))
    # Of large images there are fewer, each of at least one.
    assert len(generated(parse_sizes("3000x2000"), seed=0).labels) == 25
    assert len(generated(parse_sizes("8000x8000,8192x8192,8192x8000"), seed=0).labels) == 3


def test_sizes_are_parsed_with_their_weights() -> None:
    assert parse_sizes("640x480, 1920x1080") == ((640, 480), (1920, 1080))
    assert parse_sizes("640x480:60,224x224:20") == ((640, 480), (640, 480), (640, 480), (224, 224))


@pytest.mark.parametrize("text", ["", "640", "640x", "0x10", "640x480:0", "9000x10", "640x480;10x10", "10x10,"])
def test_a_wrong_size_names_the_format(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size: give WIDTHxHEIGHT in pixels.*such as 640x480:3,1920x1080:1"):
        parse_sizes(text)


def test_weights_that_need_too_many_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="may add up to at most 100"):
        parse_sizes("640x480:100,224x224:1")


def test_data_that_holds_nothing_to_send_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PayloadError, match="is not a folder"):
        read_payloads(tmp_path / "nowhere")
    with pytest.raises(PayloadError, match="neither image files"):
        read_payloads(tmp_path)
    folder_of(tmp_path, "test/cat/1.png")
    with pytest.raises(PayloadError, match=r"nor class folders of image files; did you mean .*/test\?"):
        read_payloads(tmp_path)
    pq.write_table(pa.table({"pixels": [1]}), tmp_path / "x.parquet")
    with pytest.raises(PayloadError, match="no column img or image: it has pixels"):
        read_payloads(tmp_path)


def test_shards_need_not_agree_in_how_they_hold_images_and_labels(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"img": [{"bytes": b"a", "path": None}], "label": pa.nulls(1)}), tmp_path / "test-0.parquet"
    )
    pq.write_table(pa.table({"img": [b"b"], "label": [7]}), tmp_path / "test-1.parquet")
    found = sorted((payload.data, payload.label) for payload in read_payloads(tmp_path))
    assert found == [(b"a", None), (b"b", 7)]


def test_the_state_of_a_folder_changes_with_its_files(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.png", "cat/b.png")
    before = state(tmp_path)
    assert state(tmp_path) == before
    (tmp_path / "cat" / "b.png").write_bytes(b"another image")
    assert state(tmp_path) != before


def test_a_parquet_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "test-0.parquet"
    write_table(file, ["a"] * 3, label=[0, 1, 2])
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PayloadError, match=r"test-0\.parquet cannot be read, it may be damaged"):
        read_payloads(tmp_path)
    file.write_bytes(whole)
    write_table(tmp_path / "test-1.parquet", ["b" * 9000], label=[0])
    damaged = (tmp_path / "test-1.parquet").read_bytes()
    (tmp_path / "test-1.parquet").write_bytes(b"PAR1" + b"\xff" * 200 + damaged[204:])
    with pytest.raises(PayloadError, match=r"test-1\.parquet: column \w+ cannot be read, it may be damaged"):
        read_payloads(tmp_path)
    pq.write_table(pa.table({"img": [{"bytes": b"b", "path": None}]}), tmp_path / "test-1.parquet")
    with pytest.raises(PayloadError, match=r"test-1\.parquet has no column label, as test-0\.parquet has"):
        read_payloads(tmp_path)
    (tmp_path / "test-1.parquet").unlink()
    pq.write_table(pa.table({"img": [1, 2]}), file)
    with pytest.raises(PayloadError, match=r"test-0\.parquet#\d: column img holds no bytes there \(int64\)"):
        read_payloads(tmp_path)
    pq.write_table(pa.table({"img": [{"path": "a.png"}]}), file)
    with pytest.raises(PayloadError, match="column img cannot be read"):
        read_payloads(tmp_path)
    pq.write_table(pa.table({"img": [{"bytes": b"a", "path": "x"}, {"bytes": None, "path": "a.png"}]}), file)
    with pytest.raises(PayloadError, match=r"test-0\.parquet#1: column img holds no bytes there"):
        read_payloads(tmp_path)


def test_real_data_is_read_with_its_labels(data_dir: Path) -> None:
    cifar = read_payloads(data_dir / "cifar100", limit=None, shuffle=False)
    assert len(cifar) == 10_000
    assert Counter(payload.label for payload in cifar) == dict.fromkeys(range(100), 100)
    assert "32×32 pixels" in describe(cifar, data_dir / "cifar100")
    photos = read_payloads(data_dir / "photos")
    labelled = {payload.name: payload.label for payload in photos if payload.label is not None}
    assert labelled["es_n02391049_zebra.jpg"] == 340
    assert 0 < len(labelled) < len(photos)
