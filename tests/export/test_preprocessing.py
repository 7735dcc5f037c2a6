"""Training evaluates the pixels that the service serves: equal with exact preprocessing, nearly so by default."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from service.errors import ImageError
from service.images import ImageRules, decode
from service.manifest import Preprocessing
from tests.service.conftest import encoded, noise
from tests.service.test_draft import MUCH_LARGER
from training import images
from training.images import resize_and_crop

SERVED = Preprocessing(resize=36, crop=32, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def both(data: bytes, *, exact: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The same encoded image by the service and by training, (32,32,3)."""
    served = ImageRules(max_pixels=50_000_000, exact=exact).open(data, SERVED).render()
    trained = np.asarray(images.decode(data, resize_and_crop(SERVED.resize, SERVED.crop)))
    return served.astype(np.int64), trained.astype(np.int64)


def ramp(dtype: type[np.generic], top: float) -> Image.Image:
    return Image.fromarray(np.linspace(0, top, 48 * 40).reshape(40, 48).astype(dtype))


TRANSPARENT = noise(48, 40).convert("RGBA")
TRANSPARENT.putalpha(noise(48, 40, seed=1).convert("L"))
PALETTE = noise(48, 40).quantize(16)
CASES = {
    "rgb": encoded(noise(48, 40)),
    "jpeg": encoded(noise(300, 200), "JPEG"),
    "grey": encoded(noise(48, 40).convert("L")),
    "palette": encoded(PALETTE),
    "transparent palette": encoded(PALETTE, transparency=3),
    "alpha": encoded(TRANSPARENT),
    "grey and alpha": encoded(TRANSPARENT.convert("LA")),
    "cmyk": encoded(noise(48, 40).convert("CMYK"), "JPEG"),
    "16-bit grey": encoded(ramp(np.uint16, 65535)),
    "32-bit grey": encoded(ramp(np.int32, 65535), "TIFF"),
    "float grey": encoded(ramp(np.float32, 1.0), "TIFF"),
    "one bit": encoded(noise(48, 40).convert("1")),
    "turned": encoded(
        noise(48, 40), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    ),
    "animation": encoded(noise(48, 40), "GIF", save_all=True, append_images=[noise(48, 40, seed=2)]),
}


@pytest.mark.parametrize("case", CASES)
def test_training_sees_what_the_service_sees(case: str) -> None:
    served, trained = both(CASES[case], exact=True)
    assert np.array_equal(served, trained)
    served, trained = both(CASES[case], exact=False)
    assert np.abs(served - trained).max() <= 2
    assert np.mean(served != trained) <= 0.05


def test_training_sees_real_odd_files_as_the_service_does(data_dir: Path) -> None:
    compared = 0
    for path in sorted((data_dir / "odd").iterdir()):
        data = path.read_bytes()
        try:
            decode(data, SERVED, max_pixels=50_000_000)
            images.decode(data)
        except ImageError:
            continue
        except Exception:  # noqa: BLE001, S112 (training reports it by name; here only what both can read counts)
            continue
        served, trained = both(data, exact=True)
        assert np.abs(served - trained).max() <= 1, path.name
        served, trained = both(data, exact=False)
        with Image.open(io.BytesIO(data)) as image:
            much_larger = image.format in ("JPEG", "MPO") and min(image.size) >= MUCH_LARGER * SERVED.resize
        assert np.abs(served - trained).max() <= (6 if much_larger else 2), path.name
        assert np.abs(served - trained).mean() <= 1, path.name
        compared += 1
    assert compared > 30


@pytest.mark.parametrize("size", [(900, 700), (437, 217)])
def test_only_the_service_drafts_and_stays_near_what_training_sees(size: tuple[int, int]) -> None:
    # 0 where nothing is drafted; the bound for photos and edges is stated in tests/service/test_draft.py.
    served, trained = both(encoded(noise(*size), "JPEG"), exact=False)
    assert np.abs(served - trained).mean() <= 0.5
    assert 0 < np.abs(served - trained).max() <= 3
