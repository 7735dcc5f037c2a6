"""What a person does on the tab Compare, and what they see."""

from typing import TYPE_CHECKING, Any

from playwright.sync_api import expect

if TYPE_CHECKING:
    from playwright.sync_api import Page


def choose(page: "Page", *, name: str, content: bytes, kind: str = "image/jpeg") -> None:
    """Pick a file in the file dialogue."""
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": content})


def answered(page: "Page") -> dict[str, str]:
    """The first answer of each model, once all have answered."""
    expect(page.locator("#timing")).to_contain_text("first answer after")
    rows: list[list[str]] = page.evaluate(
        "[...document.querySelectorAll('tr[data-model]')].map(row =>"
        " [row.dataset.model, row.querySelector('.top .label')?.textContent ?? ''])"
    )
    return {model: label for model, label in rows if label}


def verdict(page: "Page") -> str:
    """The one answer at the top."""
    return page.locator("#verdict .answer strong").inner_text()


def seen_pixels(page: "Page") -> dict[str, Any]:
    """The picture that is shown: its size, its mean colour, and how it is enlarged."""
    expect(page.locator("#seen img")).to_be_visible()
    found: dict[str, Any] = page.evaluate(
        """async () => {
          const image = document.querySelector('#seen img');
          await image.decode();
          const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
          const context = canvas.getContext('2d');
          context.drawImage(image, 0, 0);
          const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
          const mean = [0, 1, 2].map(channel => {
            let sum = 0;
            for (let at = channel; at < data.length; at += 4) sum += data[at];
            return sum / (data.length / 4);
          });
          const rendering = getComputedStyle(image).imageRendering;
          return { width: canvas.width, height: canvas.height, mean, rendering };
        }"""
    )
    return found


def hand_over(page: "Page", event: str, *, name: str, content: bytes, kind: str) -> None:
    """Drop or paste a file: real events with a real file in them."""
    page.evaluate(
        """([event, name, bytes, kind]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], name, { type: kind }));
          const made = event === 'paste'
            ? new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true })
            : new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true });
          document.body.dispatchEvent(made);
        }""",
        [event, name, list(content), kind],
    )
