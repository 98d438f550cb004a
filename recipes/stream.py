"""Streaming conversion of a checkpoint larger than the memory it takes: its peak memory and its time, as ratios.

Generates a random GPT-2 checkpoint (bf16, sharded), converts it with ``hf-glu convert --stream`` in a process of its
own, and copies the same bytes (reads the source, writes as much as the result has), in turns.

    python recipes/stream.py [--gigabytes 3] [--shard 500] [--rounds 3]
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

MEGABYTE = 10**6
HIDDEN = 2048

# prints the seconds without imports, and the peak of this process's own memory (getrusage also counts its parent's)
_CONVERT = """
import sys, time
import hf_glu.checkpoint.streaming
start = time.perf_counter()
hf_glu.convert_stream(sys.argv[1], sys.argv[2], "geglu_new")
seconds = time.perf_counter() - start
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, peak)
"""


def generate(folder: Path, gigabytes: float, shard: int) -> None:
    """Write a random GPT-2 of about this size."""
    layers = max(1, round(gigabytes * 1e9 / 2 / (12 * HIDDEN * HIDDEN)))
    config = GPT2Config(n_embd=HIDDEN, n_layer=layers, n_head=16, vocab_size=1000, n_positions=256)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in GPT2LMHeadModel(config).named_parameters()}
    shards: list[list[str]] = [[]]
    size = 0
    for key, shape in shapes.items():
        if size and size + 2 * shape.numel() > shard * MEGABYTE:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += 2 * shape.numel()
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, keys in track(list(zip(names, shards, strict=True)), description="generating"):
        tensors = {key: torch.randn(shapes[key]).mul_(0.02).bfloat16() for key in keys}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    total = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def copy_bytes(source: Path, destination: Path, size: int) -> float:
    """Read every shard and write ``size`` bytes, a megabyte at a time; return the seconds."""
    start, written = time.perf_counter(), 0
    with destination.open("wb") as out:
        while written < size:  # the result is larger than the source: read some of it again
            for shard in sorted(source.glob("*.safetensors")):
                with shard.open("rb") as file:
                    while written < size and (part := file.read(16 * MEGABYTE)):
                        out.write(part[: size - written])
                        written += len(part)
    return time.perf_counter() - start


def main(
    gigabytes: Annotated[float, typer.Option(help="Size of the checkpoint.")] = 3.0,
    shard: Annotated[int, typer.Option(help="Megabytes in a shard.")] = 500,
    rounds: Annotated[int, typer.Option(help="Runs of each, in turns.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where to work.")] = None,
) -> None:
    """Print peak memory against the largest shard, and time against copying the same bytes."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source, result = Path(scratch, "dense"), Path(scratch, "gated")
        source.mkdir()
        generate(source, gigabytes, shard)
        largest = max(path.stat().st_size for path in source.glob("*.safetensors")) / MEGABYTE
        times, alone, copies, peaks = [], [], [], []
        for _ in track(range(rounds), description="converting"):
            shutil.rmtree(result, ignore_errors=True)
            start = time.perf_counter()
            command = [sys.executable, "-c", _CONVERT, str(source), str(result)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            times.append(time.perf_counter() - start)
            seconds, peak_kilobytes = done.stdout.split()[-2:]
            alone.append(float(seconds))
            peaks.append(int(peak_kilobytes) * 1024 / MEGABYTE)
            size = sum(path.stat().st_size for path in result.glob("*.safetensors"))
            copies.append(copy_bytes(source, Path(scratch, "copy"), size))
        copied, peak = statistics.median(copies), max(peaks)
    print(f"checkpoint {gigabytes:g} GB, shards of {shard} MB (largest {largest:.0f} MB), {rounds} rounds")
    print(f"peak resident memory {peak:.0f} MB = largest shard + {peak - largest:.0f} MB (ratio {peak / largest:.2f})")
    for name, taken in (("conversion", alone), ("whole process, with its imports,", times)):
        ratio = statistics.median(taken) / copied
        print(f"{name} {statistics.median(taken):.1f} s, copying the same bytes {copied:.1f} s: {ratio:.2f}x (medians)")


if __name__ == "__main__":
    typer.run(main)
