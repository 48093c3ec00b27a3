"""Put the demo under load: hostile uploads, and many clients at once.

    python benchmarks/demo.py uploads                                  # 40 files; time and memory of the server for each
    python benchmarks/demo.py clients [--clients 100] [--requests 500]  # every client's adapter is compared by sha256
    python benchmarks/demo.py previews [--previews 1000]              # many fail half-way; the base model's weights stay as they are

The first two start the page in a process of its own, on the bundled generators or on those in --styles and --tasks.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import multiprocessing
import random
import struct
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from cond_pdiff.defaults import LANGUAGE_GENERATOR, STYLE_GENERATOR, TEXT_GENERATOR


def serve(styles: str | None, tasks: str | None, pipe: Any) -> None:
    """Run the page and send its address."""
    from cond_pdiff.page.page import LAUNCH, build_page

    page = build_page(styles or STYLE_GENERATOR, tasks or TEXT_GENERATOR, LANGUAGE_GENERATOR)
    page.launch(**LAUNCH, prevent_thread_lock=True, quiet=True)
    pipe.send(page.local_url)
    threading.Event().wait()


def hostile_files() -> dict[str, bytes]:
    """Make forty files: bombs, fragments, other formats under a picture's name, and some that are merely unusual."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (400, 600, 3), dtype=np.uint8))
    good = {kind: _encoded(noise, kind) for kind in ("PNG", "JPEG", "WEBP")}
    sizes = ((3200, 3100), (8000, 5000), (10000, 10000), (16000, 12500), (20000, 20000))
    files = {f"bomb of {w}x{h}.png": _bomb(w, h) for w, h in sizes}
    files |= {f"one bit bomb of {side}.png": _bomb(side, side, bits=1, color=0) for side in (6000, 20000)}
    files |= {f"grey jpeg of {side}.jpg": _encoded(Image.new("L", (side, side)), "JPEG") for side in (5500, 8000, 12000)}
    files["flat jpeg of 31 megapixels.jpg"] = _encoded(Image.new("RGB", (6200, 5000), "red"), "JPEG")
    files["progressive jpeg of 16 megapixels.jpg"] = _encoded(Image.new("RGB", (4000, 4000), "red"), "JPEG", progressive=True)
    files["webp of 16000.webp"] = _encoded(Image.new("RGB", (16000, 700), "red"), "WEBP")
    files["1 x 65535.png"] = _encoded(Image.new("RGB", (1, 65535)), "PNG")
    files["65535 x 1.jpg"] = _encoded(Image.new("RGB", (65500, 1)), "JPEG")
    for kind, data in good.items():
        files |= {f"half a {kind}.{kind.lower()}": data[: len(data) // 2], f"header of a {kind}.{kind.lower()}": data[:40]}
    files["empty.png"] = b""
    files["zeros.png"] = bytes(100_000)
    files["svg.png"] = b'<svg xmlns="http://www.w3.org/2000/svg" width="99999" height="99999"><script>alert(1)</script></svg>'
    files["tiff.png"] = _encoded(noise, "TIFF")
    files["gif.png"] = _encoded(noise.convert("P"), "GIF")
    files["bmp.png"] = _encoded(noise, "BMP")
    files["animated.webp"] = _encoded(noise, "WEBP", save_all=True, append_images=[noise.rotate(90)] * 3)
    files["animated.png"] = _encoded(noise, "PNG", save_all=True, append_images=[noise.rotate(90)] * 3)
    files["sixteen bits.png"] = _encoded(Image.fromarray(rng.integers(0, 65535, (300, 300)).astype(np.uint16)), "PNG")
    files["palette with transparency.png"] = _encoded(noise.quantize(16), "PNG", transparency=3)
    files["cmyk.jpg"] = _encoded(noise.convert("CMYK"), "JPEG")
    files["zip.png"] = _zip()
    files["polyglot of png and zip.png"] = good["PNG"] + _zip()
    files["polyglot of jpeg and html.jpg"] = good["JPEG"] + b"<html><script>alert(1)</script></html>"
    files["wrong checksum.png"] = good["PNG"][:40] + b"\x00\x01\x02\x03" + good["PNG"][44:]
    text = _chunk(b"zTXt", b"k\x00\x00" + zlib.compress(bytes(200_000_000)))
    files["endless text chunk.png"] = good["PNG"][:33] + text + good["PNG"][33:]
    files["too small.png"] = _encoded(Image.new("RGB", (3, 3)), "PNG")
    files["11 megabytes.png"] = _encoded(Image.fromarray(rng.integers(0, 255, (2000, 2000, 3), dtype=np.uint8)), "PNG")
    files["name with ../ and \u202e.png".replace("/", "_")] = good["PNG"]
    return files


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _bomb(width: int, height: int, bits: int = 8, color: int = 2) -> bytes:
    """Return a flat PNG, whose rows compress to nothing."""
    row = b"\x00" * (1 + (width * bits * (3 if color == 2 else 1) + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a" * 1000)
    return file.getvalue()


def peak_memory(pid: int) -> int:
    """Return the peak resident memory of a process since the last call, in bytes (Linux)."""
    peak = next(int(line.split()[1]) * 1024 for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak


def resident_memory(pid: int) -> int:
    """Return the resident memory of a process now, in bytes (Linux)."""
    return next(int(line.split()[1]) * 1024 for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))


def uploads(address: str, pid: int, folder: Path) -> None:
    """Send every hostile file, and print what came of it."""
    client = Client(address, verbose=False)
    picture = folder / "picture.png"
    Image.new("RGB", (300, 200), "orange").save(picture)
    for _ in range(3):
        client.predict(handle_file(picture), None, 0.5, 0, api_name="/make_style")
    outcomes: Counter[str] = Counter()
    slowest = largest = 0.0
    for name, data in hostile_files().items():
        path = folder / name
        path.write_bytes(data)
        before = resident_memory(pid)
        peak_memory(pid)
        started = time.perf_counter()
        try:
            client.predict(handle_file(path), None, 0.5, 0, api_name="/make_style")
            outcome, message = "adapter", ""
        except (AppError, ValueError) as error:
            outcome, message = "refused", " ".join(str(error).split())[:90]
        except Exception as error:  # what must not happen
            outcome, message = "UNHANDLED", f"{type(error).__name__}: {error}"[:90]
        seconds, grown = time.perf_counter() - started, (peak_memory(pid) - before) / 1e6
        slowest, largest = max(slowest, seconds), max(largest, grown)
        outcomes[outcome] += 1
        print(f"{name:<40} {len(data):>9} bytes  {seconds:5.2f} s  +{grown:5.1f} MB  {outcome} {message}", flush=True)
    print(f"{sum(outcomes.values())} files: {dict(outcomes)}; at most {slowest:.2f} s and +{largest:.1f} MB")


def clients(address: str, folder: Path, num_clients: int, num_requests: int) -> None:
    """Let many clients ask at once, each for its own seed; the same seed must always give the same bytes."""
    picture = folder / "picture.png"
    Image.new("RGB", (300, 200), "orange").save(picture)
    expected: dict[int, set[str]] = {}
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()

    def ask(number: int) -> None:
        rng = random.Random(number)
        client = Client(address, verbose=False, download_files=folder / f"client-{number}")
        for _ in range(num_requests // num_clients):
            seed = rng.randrange(20)
            try:
                *_, made = client.predict(handle_file(picture), None, 0.5, seed, api_name="/make_style")
                with zipfile.ZipFile(made) as archive:
                    sha256 = hashlib.sha256(archive.read("adapter/adapter_model.safetensors")).hexdigest()
                outcome = "adapter"
                with lock:
                    expected.setdefault(seed, set()).add(sha256)
            except Exception as error:
                outcome = "queue full" if "queue is full" in str(error).lower() else f"UNHANDLED {type(error).__name__}: {error}"[:120]
            with lock:
                outcomes[outcome] += 1

    started = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        list(pool.map(ask, range(num_clients)))
    mixed = [seed for seed, found in expected.items() if len(found) > 1]
    different = len(set.union(*expected.values())) if expected else 0
    print(f"{num_clients} clients, {sum(outcomes.values())} requests in {time.perf_counter() - started:.0f} s: {dict(outcomes)}")
    print(f"{len(expected)} seeds gave {different} different adapters; seeds with more than one: {len(mixed)}")


def previews(styles: str, count: int) -> None:
    """Make previews with one or two random adapters, of which about half fail inside the transformer."""
    import torch
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    from cond_pdiff import CondPDiffPipeline
    from cond_pdiff.text_to_image import load_text_to_image, make_pictures

    generator = CondPDiffPipeline.from_pretrained(styles)
    generator.set_progress_bar_config(disable=True)
    adapters = generator(Image.new("RGB", (64, 64), "orange"), num_adapters=8, generator=torch.Generator().manual_seed(0)).adapters
    base = load_text_to_image(generator.template.base)

    def weights_sha256() -> str:
        return hashlib.sha256(b"".join(value.numpy().tobytes() for value in base.transformer.state_dict().values())).hexdigest()

    rng, original, before, failed = random.Random(0), PixArtTransformer2DModel.forward, weights_sha256(), 0
    plain = make_pictures(base, ["a house"], num_inference_steps=2)[0].tobytes()
    for _ in range(count):
        left = rng.choice((1, 2, 99))

        def failing(self: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise RuntimeError("out of memory")
            return original(self, *arguments, **options)

        PixArtTransformer2DModel.forward = failing
        chosen = [(adapter, rng.uniform(-1, 2)) for adapter in rng.sample(adapters, rng.choice((1, 2)))]
        try:
            make_pictures(base, ["a house"], chosen, num_inference_steps=2)
        except RuntimeError:
            failed += 1
    PixArtTransformer2DModel.forward = original
    same = make_pictures(base, ["a house"], num_inference_steps=2)[0].tobytes() == plain
    print(f"{count} previews, {failed} failed; weights unchanged: {weights_sha256() == before}; same picture as before: {same}")


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("uploads", "clients", "previews"))
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--previews", type=int, default=1000)
    parser.add_argument("--styles", help="style generator (default: the bundled one)")
    parser.add_argument("--tasks", help="text generator (default: the bundled one)")
    arguments = parser.parse_args()
    if arguments.what == "previews":
        previews(arguments.styles or STYLE_GENERATOR, arguments.previews)
        return
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(arguments.styles, arguments.tasks, theirs), daemon=True)
    server.start()
    address = ours.recv()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.what == "uploads":
            uploads(address, server.pid or 0, Path(folder))
        else:
            clients(address, Path(folder), arguments.clients, arguments.requests)
    server.terminate()


if __name__ == "__main__":
    main()
