"""Measure how many JPEGs a second threads decode into batches, and what the GPU's decoder does.

    python benchmarks/decode_threads.py [--device cuda] [--threads 1,2,4,8,16] [FILES ...]

Each photograph is decoded, cropped at random to 224 pixels and mirrored, as `mae pretrain` does it,
and put into a batch in page-locked memory if there is a GPU. Without FILES, photographs of
500 x 375 pixels are drawn. Needs neither Ray nor a network.
"""

import argparse
import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from mae_core.data.views import ViewSpec, training_view

BATCH = 256
SPEC = ViewSpec(seed=0, in_chans=3, size=(224, 224), crop_scale=(0.2, 1.0), flip=True)


def main() -> None:
    args = parse_arguments()
    images = [Path(file).read_bytes() for file in args.files] or drawn_photographs(64)
    size = sum(map(len, images)) / len(images) / 1000
    print(f"{len(images)} JPEGs of {size:.0f} kB on average; batches of {BATCH}\n")
    print("| decoder | threads | images/s |")
    print("|---|---|---|")
    for threads in map(int, args.threads.split(",")):
        rate = rate_of_threads(images, threads, args.seconds, is_pinned=args.device == "cuda")
        print(f"| simplejpeg, crop, resize | {threads} | {rate:.0f} |", flush=True)
    if args.device == "cuda":
        rate = rate_of_gpu(images, args.seconds)
        print(f"| torchvision on the GPU, whole pictures | | {rate:.0f} |")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", default="1,2,4,8,16")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each row")
    parser.add_argument("files", nargs="*")
    return parser.parse_args()


def drawn_photographs(count: int) -> list[bytes]:
    """Draw noise of several scales, which compresses like a photograph."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(count):
        picture = np.zeros((375, 500, 3))
        for cells in (4, 16, 64, 250):
            noise = generator.integers(0, 256, (cells * 3 // 4 + 1, cells, 3), dtype=np.uint8)
            layer = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
            picture += np.asarray(layer) / 4
        buffer = io.BytesIO()
        Image.fromarray(picture.astype(np.uint8)).save(buffer, "JPEG", quality=92)
        images.append(buffer.getvalue())
    return images


def rate_of_threads(images: list[bytes], threads: int, seconds: float, *, is_pinned: bool) -> float:
    shape = (BATCH, *SPEC.size, 3)
    batch = torch.empty(shape, dtype=torch.uint8, pin_memory=is_pinned).numpy()

    def decode(place: int, epoch: int) -> None:
        view = training_view(images[place % len(images)], epoch, str(place), SPEC)
        batch[place] = view

    with ThreadPoolExecutor(threads) as pool:
        began, epoch = time.perf_counter(), 0
        while epoch == 0 or time.perf_counter() - began < seconds:
            list(pool.map(decode, range(BATCH), [epoch] * BATCH))
            epoch += 1
        return epoch * BATCH / (time.perf_counter() - began)


def rate_of_gpu(images: list[bytes], seconds: float) -> float:
    coded: list[Tensor] = [
        torch.frombuffer(bytearray(images[i % len(images)]), dtype=torch.uint8)
        for i in range(BATCH)
    ]
    torchvision.io.decode_jpeg(coded, device="cuda")
    torch.cuda.synchronize()
    began, rounds = time.perf_counter(), 0
    while rounds == 0 or time.perf_counter() - began < seconds:
        torchvision.io.decode_jpeg(coded, device="cuda")
        torch.cuda.synchronize()
        rounds += 1
    return rounds * BATCH / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
