"""Images per second and core that can be read: JPEG files, and ArrayRecord files.

    python bench/input.py

prints one JSON line; `ratio` is jaxkd's pipeline over a plain Pillow loop, both on JPEG
files. All sides read the same images, decode them and resize them to one size:

    pillow        a loop over the files, without batches;
    jpeg          jaxkd's `image_folder` through grain, in batches;
    array_record  the same JPEG bytes in ArrayRecord, jaxkd's `tfds` through grain;
    torch         a `DataLoader` over the files, one worker per core.

`array_record_small` reads what needs no decoding, 32x32 uint8. A call is a pass over
the whole set, so that nobody reads ahead while others are timed. The process has
`--threads` cores, one by default. The images are synthetic, about as hard to decode as
photographs; files lie in the system's page cache.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import numpy as np
import synthetic
from measuring import Side
from PIL import Image

SMALL = 32
SIDES = ("pillow", "jpeg", "array_record", "array_record_small", "torch")
# What a side needs beside jaxkd's own dependencies.
NEEDS = {
    "array_record": ("tensorflow_datasets", "pip install 'jaxkd[data]'"),
    "array_record_small": ("tensorflow_datasets", "pip install 'jaxkd[data]'"),
    "torch": ("torch", "pip install 'jaxkd[bench]'"),
}


class Options(NamedTuple):
    """What is measured."""

    sides: tuple[str, ...]
    files: int
    small_records: int
    height: int
    width: int
    image_size: int
    batch_size: int
    rounds: int
    threads: int


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads and checks the command line."""
    parser = measuring.Parser("input.py", __doc__)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--files", type=int, default=256)
    parser.add_argument("--small-records", type=int, default=4096)
    parser.add_argument("--height", type=int, default=375, help="of the files")
    parser.add_argument("--width", type=int, default=500, help="of the files")
    parser.add_argument("--image-size", type=int, default=224, help="after resizing")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="cores for each side")
    values = vars(parser.parse_args(arguments))
    values["sides"] = tuple(values["sides"].split(","))
    options = Options(**values)
    for name in options.sides:
        if name not in SIDES:
            raise measuring.Mistake(f"--sides: no {name!r}; known: {', '.join(SIDES)}")
        if name in NEEDS:
            package, install = NEEDS[name]
            measuring.need(package, f"{install}, or leave {name!r} out of --sides")
    measuring.at_least(
        options, 1, "height", "width", "image_size", "batch_size", "rounds", "threads"
    )
    for name in ("files", "small_records"):
        if getattr(options, name) < max(options.batch_size, 2):
            raise measuring.Mistake(
                f"--{name.replace('_', '-')} {getattr(options, name)} is less than one "
                f"batch of {options.batch_size}, or than two"
            )
    return options


def read_file(file: Path, image_size: int) -> np.ndarray:
    """A JPEG file as an array, in the plain Pillow way."""
    with Image.open(file) as image:
        resized = image.convert("RGB").resize(
            (image_size, image_size), Image.Resampling.BILINEAR
        )
        return np.array(resized)


def pillow_side(files: Sequence[Path], image_size: int) -> Side:
    """A loop over the files."""

    def run(passes: int) -> float:
        image = np.zeros(1)
        for _ in range(passes):
            for file in files:
                image = read_file(file, image_size)
        return float(image.mean())

    return Side(run, len(files), 1)


def source_side(source: Any, batch_size: int) -> Side:
    """A source of jaxkd through its pipeline; each pass has full batches only."""
    from jaxkd.data import pipeline

    batches = pipeline.train_batches(source, batch_size=batch_size, seed=0, epochs=1)

    def run(passes: int) -> float:
        image = np.zeros(1)
        for _ in range(passes):
            with contextlib.closing(iter(batches)) as iterator:
                for batch in iterator:
                    image = batch["image"]
        return float(image[-1].mean())

    return Side(run, len(batches) * batch_size, 1)


class Files:
    """The files as a data set for PyTorch.

    Args:
      files: JPEG files.
      image_size: height and width of the arrays.
    """

    def __init__(self, files: Sequence[Path], image_size: int):
        self._files, self._image_size = files, image_size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> np.ndarray:
        return read_file(self._files[index], self._image_size)


def torch_side(options: Options, files: Sequence[Path]) -> Side:
    """A `DataLoader` whose workers stay from pass to pass."""
    import torch.utils.data

    data: Any = Files(files, options.image_size)
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=options.threads,
        persistent_workers=True,
        # JAX and grain have threads, which a forked process must not inherit.
        multiprocessing_context="spawn",
    )

    def run(passes: int) -> float:
        last = torch.zeros(1)
        for _ in range(passes):
            for batch in loader:
                last = batch[-1]
        return float(last.float().mean())

    return Side(run, len(loader) * options.batch_size, 1)


def prepare_array_record(folder: Path, name: str, images: Sequence[Any]) -> Path:
    """Writes images to ArrayRecord files by way of TFDS.

    Args:
      folder: for the data set.
      name: of the data set.
      images: JPEG files, or uint8 arrays `[h, w, 3]`, which are stored as they are.

    Returns:
      The folder of the version.
    """
    import tensorflow_datasets as tfds

    features = tfds.features
    image_feature = features.Image(shape=(None, None, 3), encoding_format="jpeg")
    if isinstance(images[0], np.ndarray):
        image_feature = features.Tensor(shape=images[0].shape, dtype=np.uint8)

    def describe(self: Any) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {"image": image_feature, "label": features.ClassLabel(num_classes=2)}
            ),
        )

    def records(self: Any, images: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        del self
        for i, image in enumerate(images):
            stored = str(image) if isinstance(image, Path) else image
            yield str(i), {"image": stored, "label": i % 2}

    def split(self: Any, manager: Any) -> dict[str, Any]:
        del manager
        return {"train": self._generate_examples(images)}

    builder_class = type(
        name,
        (tfds.core.GeneratorBasedBuilder,),
        {
            "VERSION": tfds.core.Version("1.0.0"),
            "_info": describe,
            "_split_generators": split,
            "_generate_examples": records,
        },
    )
    builder = builder_class(data_dir=str(folder), file_format="array_record")
    tfds.disable_progress_bar()
    # Standard output is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        builder.download_and_prepare()
    return Path(builder.data_dir)


def make_sides(options: Options, folder: Path) -> dict[str, Side]:
    """Writes the data and makes what reads them."""
    from jaxkd import data

    size, batch_size = options.image_size, options.batch_size
    photographs = folder / "photographs"
    files = synthetic.write_photographs(
        photographs, count=options.files, height=options.height, width=options.width
    )

    def tfds_source(name: str, images: Sequence[Any], image_size: int) -> Any:
        path = prepare_array_record(folder, name, images)
        return data.load("tfds", split="train", path=path, image_size=image_size)

    def make(name: str) -> Side:
        if name == "pillow":
            return pillow_side(files, size)
        if name == "torch":
            return torch_side(options, files)
        if name == "jpeg":
            source = data.load(
                "image_folder", split="train", path=photographs, image_size=size
            )
        elif name == "array_record":
            source = tfds_source("BenchPhotographs", files, size)
        else:
            rng = np.random.default_rng(0)
            shape = (options.small_records, SMALL, SMALL, 3)
            images = rng.integers(256, size=shape, dtype=np.uint8)
            source = tfds_source("BenchSmall", list(images), SMALL)
        return source_side(source, batch_size)

    return {name: make(name) for name in options.sides}


def summarise(options: Options, rates: dict[str, list[float]]) -> dict[str, Any]:
    """The line to print; what was not measured is None."""
    ratio = None
    if {"jpeg", "pillow"} <= rates.keys():
        ratio = measuring.ratio_of(rates["jpeg"], rates["pillow"])
    per_core = {k: [rate / options.threads for rate in v] for k, v in rates.items()}
    # The loop has one core, however many there are.
    if "pillow" in rates:
        per_core["pillow"] = rates["pillow"]
    return {
        "benchmark": "input",
        "ratio": ratio,
        "images_per_second": {k: measuring.spread(v) for k, v in rates.items()},
        "images_per_second_per_core": {
            k: measuring.spread(v)["median"] for k, v in per_core.items()
        },
        "threads": options.threads,
        "data": f"synthetic JPEG {options.width}x{options.height}, resized to "
        f"{options.image_size}",
        "files": options.files,
        "small_records": options.small_records,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
    }


def work(options: Options) -> dict[str, Any]:
    """Reads synthetic images."""
    with tempfile.TemporaryDirectory() as folder:
        sides = make_sides(options, Path(folder))
        rates = measuring.take_turns(sides, rounds=options.rounds)
    return summarise(options, rates)


def measure(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Measures what the command line asks for."""
    return measuring.report(parse(arguments), work)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints one JSON line, returns the exit status."""
    return measuring.end(measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
