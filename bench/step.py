"""Images per second of the distillation step, beside the same step in PyTorch.

    python bench/step.py

prints one JSON line; `ratio` is jaxkd over PyTorch. Both sides train the same student
from the same frozen teacher on the same images with the same number of threads, in
float32 on the CPU. They take turns within one process, round by round, and medians
over rounds are compared. Nothing but the step is timed: images lie ready in memory, and
compilation and a first step come before. Other work on the machine slows PyTorch's
OpenMP threads more than XLA's, so only the ratio of an idle machine means anything;
`load` says how busy it was at the start.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

NUM_CLASSES = 100
TEMPERATURE = 4.0
WEIGHTS = {"ce": 0.1, "kd": 0.9}
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch")


class Side(NamedTuple):
    """One framework's step: `run(n)` does n steps, waits for them, returns the loss."""

    run: Callable[[int], float]
    parameters: dict[str, int]


class Options(NamedTuple):
    """What is measured."""

    teacher: str
    student: str
    batch_size: int
    image_size: int
    steps: int
    rounds: int
    threads: int
    peer: str


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads and checks the command line; a mistake ends with status 2."""
    parser = argparse.ArgumentParser(
        prog="python bench/step.py", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--teacher", default="resnet32x4")
    parser.add_argument("--student", default="resnet8x4")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, default=usable_cores(), help="for each side"
    )
    parser.add_argument(
        "--peer",
        choices=("torch", "none"),
        default="torch",
        help="none measures jaxkd alone and leaves the ratio null",
    )
    options = Options(**vars(parser.parse_args(arguments)))
    for name in ("batch_size", "image_size", "steps", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.threads > usable_cores():
        parser.error(
            f"--threads {options.threads}, but this process may use "
            f"{usable_cores()} cores"
        )
    return options


def unknown_networks(options: Options) -> str | None:
    """What is wrong with the names of the networks, in one line; None if nothing."""
    from jaxkd import models

    known = set(models.names())
    if options.peer == "torch":
        import torch_networks

        known &= set(torch_networks.NETWORKS)
    for name in (options.teacher, options.student):
        if name not in known:
            return f"no network {name!r} to measure; known: {', '.join(sorted(known))}"
    return None


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_threads(threads: int) -> None:
    """Leaves `threads` cores to this process; XLA makes one thread for each.

    Must come before the first use of JAX.
    """
    if threads == usable_cores():
        return
    if not hasattr(os, "sched_setaffinity"):
        sys.exit("--threads needs sched_setaffinity, which only Linux has")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def make_data(options: Options) -> tuple[np.ndarray, np.ndarray]:
    """One batch: images `[b, h, w, 3]` float32 and labels `[b]` int32."""
    rng = np.random.default_rng(0)
    shape = (options.batch_size, options.image_size, options.image_size, 3)
    images = rng.standard_normal(shape, dtype=np.float32)
    labels = rng.integers(NUM_CLASSES, size=options.batch_size, dtype=np.int32)
    return images, labels


def jax_side(options: Options, images: np.ndarray, labels: np.ndarray) -> Side:
    """The train step of `jaxkd.training`, as the loop compiles it."""
    import jax

    jax.config.update("jax_platforms", "cpu")

    import jax.numpy as jnp
    import optax

    from jaxkd import distill, models
    from jaxkd.data.augment import Augmentation
    from jaxkd.training.network import from_linen
    from jaxkd.training.step import init_state, make_train_step

    student, teacher = (
        from_linen(name, models.create(name, num_classes=NUM_CLASSES), images.shape[1:])
        for name in (options.student, options.teacher)
    )
    method = distill.weighted(WEIGHTS, kd={"temperature": TEMPERATURE})
    tx = optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
    )
    data = distill.DataSpec(
        records=len(images),
        num_classes=NUM_CLASSES,
        batch_size=len(images),
        steps_per_epoch=1,
        epochs=1,
    )
    # rbg keys compile in a third of threefry's time, and the step draws nothing.
    state = jax.jit(
        lambda key: init_state(
            key, student=student, method=method, teachers=[teacher], tx=tx, data=data
        )
    )(jax.random.key(0, impl="rbg"))
    teachers = (jax.jit(teacher.init)(jax.random.key(1, impl="rbg")),)
    step = jax.jit(
        make_train_step(
            student=student.apply,
            teachers=[teacher.apply],
            method=method,
            tx=tx,
            schedule=lambda step: jnp.asarray(LEARNING_RATE),
            augmentation=Augmentation(),
            num_classes=NUM_CLASSES,
            steps_per_epoch=data.steps_per_epoch,
            epochs=data.epochs,
        ),
        donate_argnums=0,
    )
    batch = jax.device_put(
        {
            "image": images,
            "label": labels,
            "index": np.arange(len(labels), dtype=np.int32),
        }
    )

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch, teachers)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return Side(
        run,
        {
            "teacher": count(teachers[0]["params"]),
            "student": count(state.params["network"]),
        },
    )


def count(params: object) -> int:
    """The number of values in a tree of arrays."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


def torch_side(options: Options, images: np.ndarray, labels: np.ndarray) -> Side:
    """The same step in eager PyTorch, channels last."""
    import torch
    import torch.nn.functional as F
    import torch_networks

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    student, teacher = (
        torch_networks.create(name, num_classes=NUM_CLASSES).to(
            memory_format=torch.channels_last
        )
        for name in (options.student, options.teacher)
    )
    student.train()
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )
    # [b, h, w, c] in memory, seen as [b, c, h, w]: channels last.
    inputs = torch.from_numpy(images).permute(0, 3, 1, 2)
    targets = torch.from_numpy(labels).long()

    def run(steps: int) -> float:
        for _ in range(steps):
            with torch.no_grad():
                soft = F.log_softmax(teacher(inputs) / TEMPERATURE, dim=1)
            logits = student(inputs)
            kd = TEMPERATURE**2 * F.kl_div(
                F.log_softmax(logits / TEMPERATURE, dim=1),
                soft,
                reduction="batchmean",
                log_target=True,
            )
            ce = F.cross_entropy(logits, targets)
            loss = WEIGHTS["ce"] * ce + WEIGHTS["kd"] * kd
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return loss.item()

    return Side(
        run,
        {
            "teacher": torch_networks.count_parameters(teacher),
            "student": torch_networks.count_parameters(student),
        },
    )


def measure(
    sides: dict[str, Side],
    *,
    batch_size: int,
    steps: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Images per second of every side in every round; the sides take turns.

    Raises:
      ValueError: two sides train networks of different sizes.
      FloatingPointError: the loss of a side is not finite.
    """
    (first, expected), *others = [(k, s.parameters) for k, s in sides.items()]
    for name, parameters in others:
        if parameters != expected:
            raise ValueError(
                f"the networks differ: {first} has {expected} parameters, "
                f"{name} has {parameters}"
            )
    for side in sides.values():
        side.run(1)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(rounds):
        for name, side in sides.items():
            # An untimed step wakes this side's threads and fills its caches.
            side.run(1)
            start = clock()
            loss = side.run(steps)
            rates[name].append(steps * batch_size / (clock() - start))
            if not np.isfinite(loss):
                raise FloatingPointError(f"{name}: the loss is {loss}")
        shown = ", ".join(f"{k} {v[-1]:.1f} images/s" for k, v in rates.items())
        print(f"round {round_number + 1} of {rounds}: {shown}", file=sys.stderr)
    return rates


def summarise(
    options: Options,
    rates: dict[str, list[float]],
    parameters: dict[str, int],
    load: float | None,
) -> dict[str, object]:
    """The line to print; what was not measured is None."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians["jax"] / medians["torch"] if "torch" in medians else None
    return {
        "benchmark": "kd_step",
        "ratio": None if ratio is None else round(ratio, 4),
        "jax_images_per_second": round(medians["jax"], 2),
        "torch_images_per_second": (
            round(medians["torch"], 2) if "torch" in medians else None
        ),
        "threads": options.threads,
        "device": f"cpu ({cpu_name()})",
        "load": load,
        "versions": versions(),
        "rounds": options.rounds,
        "steps": options.steps,
        "teacher": options.teacher,
        "student": options.student,
        "parameters": parameters,
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "dtype": "float32",
        "jax_rounds": [round(v, 2) for v in rates["jax"]],
        "torch_rounds": [round(v, 2) for v in rates.get("torch", [])],
    }


def cpu_name() -> str:
    """The processor in words, as far as the system tells."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def busy() -> float | None:
    """Processes that wanted a core during the last minute; None where unknown."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, where installed."""
    import jaxkd

    found = {"python": platform.python_version(), "jaxkd": jaxkd.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints one JSON line, returns the exit status."""
    options = parse(arguments)
    if options.peer == "torch":
        try:
            import torch  # noqa: F401
        except ImportError:
            print(
                "the PyTorch peer needs torch: pip install 'jaxkd[bench]', "
                "or measure jaxkd alone with --peer=none",
                file=sys.stderr,
            )
            return 2
    mistake = unknown_networks(options)
    if mistake is not None:
        print(mistake, file=sys.stderr)
        return 2
    load = busy()
    if load is not None and load > 0.5:
        print(
            f"other work on this machine (load {load}) makes the ratio unreliable",
            file=sys.stderr,
        )
    limit_threads(options.threads)
    images, labels = make_data(options)
    sides = {"jax": jax_side(options, images, labels)}
    if options.peer == "torch":
        sides["torch"] = torch_side(options, images, labels)
    rates = measure(
        sides,
        batch_size=options.batch_size,
        steps=options.steps,
        rounds=options.rounds,
    )
    print(json.dumps(summarise(options, rates, sides["jax"].parameters, load)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
