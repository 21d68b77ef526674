"""Images per second of the distillation step, beside the same step in PyTorch.

    python bench/step.py
    python bench/step.py --device=gpu --precision=bfloat16 --pair=imagenet

prints one JSON line; `ratio` is jaxkd over eager PyTorch, `ratios` over every peer. All
sides train the same student from the same frozen teacher on the same images, on the CPU
with the same number of threads. They take turns within one process, round by round, and
medians over rounds are compared. Nothing but the step is timed: images lie ready in
memory, and compilation and a first step come before. Other work on the machine slows
PyTorch's OpenMP threads more than XLA's, so only the ratio of an idle machine means
anything; `load` says how busy it was at the start.

On a GPU the peers are PyTorch in eager mode, compiled (`torch.compile`), and compiled
into CUDA graphs (`mode="reduce-overhead"`), all channels last, with a fused optimiser,
and with automatic mixed precision if `--precision=bfloat16`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import measuring
import numpy as np
from measuring import Mistake, Side

TEMPERATURE = 4.0
WEIGHTS = {"ce": 0.1, "kd": 0.9}
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
# What a pair means where no other option says it.
PAIRS = {
    "cifar": dict(
        teacher="resnet32x4",
        student="resnet8x4",
        image_size=32,
        classes=100,
        batch_size=dict(cpu=64, gpu=64),
    ),
    "imagenet": dict(
        teacher="resnet50",
        student="resnet18",
        image_size=224,
        classes=1000,
        batch_size=dict(cpu=8, gpu=256),
    ),
}
STEPS = dict(cpu=3, gpu=40)
# Each peer and the mode of torch.compile, None for eager.
PEERS = {
    "torch": None,
    "torch_compile": "default",
    "torch_graphs": "reduce-overhead",
}
DEFAULT_PEERS = dict(cpu="torch", gpu="torch,torch_compile,torch_graphs")


class Options(NamedTuple):
    """What is measured."""

    pair: str
    teacher: str
    student: str
    batch_size: int
    image_size: int
    classes: int
    device: str
    precision: str
    steps: int
    steps_per_call: int
    rounds: int
    threads: int
    peers: tuple[str, ...]


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads and checks the command line."""
    parser = measuring.Parser("step.py", __doc__)
    parser.add_argument("--pair", choices=tuple(PAIRS), default="cifar")
    parser.add_argument("--teacher", help="instead of the pair's")
    parser.add_argument("--student", help="instead of the pair's")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--classes", type=int)
    parser.add_argument("--device", choices=measuring.DEVICES, default="cpu")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32"
    )
    parser.add_argument("--steps", type=int, help="per round")
    parser.add_argument(
        "--steps-per-call", type=int, default=1, help="of jaxkd: steps in one program"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--threads",
        type=int,
        default=measuring.usable_cores(),
        help="for each side, on the CPU",
    )
    parser.add_argument(
        "--peer",
        help=f"of {', '.join(PEERS)}, with commas; none measures jaxkd alone and "
        "leaves the ratio null",
    )
    values = vars(parser.parse_args(arguments))
    device, peer = values["device"], values.pop("peer")
    for name, value in {**PAIRS[values["pair"]], "steps": STEPS}.items():
        if values[name] is None:
            values[name] = value[device] if isinstance(value, dict) else value
    peer = peer or DEFAULT_PEERS[device]
    peers = () if peer == "none" else tuple(peer.split(","))
    for name in peers:
        if name not in PEERS:
            raise Mistake(f"--peer: no peer {name!r}; take none or {', '.join(PEERS)}")
    options = Options(**values, peers=peers)
    measuring.at_least(
        options,
        1,
        *("batch_size", "image_size", "classes", "steps", "steps_per_call"),
        *("rounds", "threads"),
    )
    if options.steps % options.steps_per_call:
        raise Mistake(
            f"--steps-per-call {options.steps_per_call} does not divide --steps "
            f"{options.steps}"
        )
    return options


def check_networks(options: Options) -> None:
    """Checks the names of the networks.

    Raises:
      Mistake: a side does not have one of them.
    """
    from jaxkd import models

    known = set(models.names())
    if options.peers:
        import torch_networks

        known &= set(torch_networks.names())
    for name in (options.teacher, options.student):
        if name not in known:
            raise Mistake(
                f"no network {name!r} to measure; known: {', '.join(sorted(known))}"
            )


def make_data(options: Options) -> tuple[np.ndarray, np.ndarray]:
    """One batch: images `[b, h, w, 3]` float32 and labels `[b]` int32."""
    rng = np.random.default_rng(0)
    shape = (options.batch_size, options.image_size, options.image_size, 3)
    images = rng.standard_normal(shape, dtype=np.float32)
    labels = rng.integers(options.classes, size=options.batch_size, dtype=np.int32)
    return images, labels


def jax_training(options: Options, images: np.ndarray, labels: np.ndarray) -> Any:
    """The step as the command compiles it, with one batch of records on the device."""
    import programs

    names = tuple(map(str, range(options.classes)))
    config = {
        "precision": options.precision,
        "data": {
            "source": "arrays",
            "batch_size": options.batch_size,
            **{"images": images, "labels": labels, "class_names": names},
        },
        "networks": {
            "teacher": {"name": options.teacher, "frozen": True},
            "student": {"name": options.student},
        },
        "stages": {
            "student": {
                "teachers": ("teacher",),
                "method": {
                    "ce": {"weight": WEIGHTS["ce"]},
                    "kd": {"weight": WEIGHTS["kd"], "temperature": TEMPERATURE},
                },
                "optimizer": {
                    "learning_rate": LEARNING_RATE,
                    "momentum": MOMENTUM,
                    "weight_decay": WEIGHT_DECAY,
                },
                # One batch is an epoch.
                "epochs": options.steps_per_call,
            }
        },
        "run": ("student",),
        "train": {"resident": True, "steps_per_call": options.steps_per_call},
    }
    setup = programs.set_up(config)
    return programs.Training(setup, setup.stages[0], repeat=True)


def torch_side(
    options: Options, name: str, images: np.ndarray, labels: np.ndarray
) -> tuple[Side, dict[str, int]]:
    """The same step in PyTorch, channels last; and the sizes of its networks."""
    import torch
    import torch.nn.functional as F
    import torch_networks

    gpu = options.device == "gpu"
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    if gpu:
        # What XLA does: the fastest convolution, TF32 for products of float32.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(options.threads)
    student, teacher = (
        torch_networks.create(network, num_classes=options.classes)
        .to(device)
        .to(memory_format=torch.channels_last)
        for network in (options.student, options.teacher)
    )
    student.train()
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        fused=gpu,
    )
    # [b, h, w, c] in memory, seen as [b, c, h, w]: channels last.
    inputs = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)
    targets = torch.from_numpy(labels).long().to(device)
    mixed = options.precision == "bfloat16"

    def loss_of(inputs: Any, targets: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
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
            return WEIGHTS["ce"] * ce + WEIGHTS["kd"] * kd

    mode = PEERS[name]
    compute = loss_of if mode is None else torch.compile(loss_of, mode=mode)

    def run(steps: int) -> float:
        for _ in range(steps):
            loss = compute(inputs, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        value = loss.item()
        if gpu:
            torch.cuda.synchronize()
        return value

    parameters = {
        "teacher": torch_networks.count_parameters(teacher),
        "student": torch_networks.count_parameters(student),
    }
    return Side(run, options.batch_size, options.steps), parameters


def check_parameters(parameters: dict[str, dict[str, int]]) -> None:
    """Checks that all sides train networks of the same sizes.

    Raises:
      ValueError: they do not.
    """
    (first, expected), *others = parameters.items()
    for name, sizes in others:
        if sizes != expected:
            raise ValueError(
                f"the networks differ: {first} has {expected} parameters, {name} has "
                f"{sizes}"
            )


def summarise(
    options: Options,
    rates: dict[str, list[float]],
    *,
    parameters: dict[str, int],
    flops_per_step: float | None,
    ceiling: float,
) -> dict[str, Any]:
    """The line to print; what was not measured is None."""
    sides = {}
    for name, values in rates.items():
        sides[name] = measuring.spread(values)
        if flops_per_step is not None:
            rate = flops_per_step * sides[name]["median"] / options.batch_size
            sides[name]["flops_per_second"] = rate
            sides[name]["ceiling_share"] = round(rate / ceiling, 4)
    ratios = {
        name: measuring.ratio_of(rates["jax"], values)
        for name, values in rates.items()
        if name != "jax"
    }
    torch = sides.get("torch")
    return {
        "benchmark": "kd_step",
        "ratio": ratios.get("torch"),
        "ratios": ratios,
        "jax_images_per_second": sides["jax"]["median"],
        "torch_images_per_second": None if torch is None else torch["median"],
        "sides": sides,
        "flops_per_step": flops_per_step,
        "ceiling_flops_per_second": ceiling,
        "threads": options.threads,
        "rounds": options.rounds,
        "steps": options.steps,
        "steps_per_call": options.steps_per_call,
        "teacher": options.teacher,
        "student": options.student,
        "parameters": parameters,
        "batch_size": options.batch_size,
        "image_size": options.image_size,
        "classes": options.classes,
        "dtype": options.precision,
    }


def work(options: Options) -> dict[str, Any]:
    """Trains in all ways, in turns."""
    check_networks(options)
    if options.peers and options.device == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise Mistake(
                "--device=gpu, but this PyTorch has no GPU; install its CUDA build, or "
                "measure jaxkd alone with --peer=none"
            )
    from jaxkd.analysis.ceiling import matmul_ceiling

    images, labels = make_data(options)
    ceiling = matmul_ceiling(options.precision)
    training = jax_training(options, images, labels)
    sides = {"jax": training.side(steps=options.steps)}
    parameters = {"jax": training.parameters}
    for name in options.peers:
        sides[name], parameters[name] = torch_side(options, name, images, labels)
    check_parameters(parameters)
    rates = measuring.take_turns(sides, rounds=options.rounds)
    training.close()
    return summarise(
        options,
        rates,
        parameters=training.parameters,
        flops_per_step=training.programs.flops_per_step,
        ceiling=ceiling,
    )


def measure(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Measures what the command line asks for."""
    options = parse(arguments)
    if options.peers:
        measuring.need(
            "torch",
            "the PyTorch peer needs it: pip install 'jaxkd[bench]', or measure jaxkd "
            "alone with --peer=none",
        )
    return measuring.report(options, work)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints one JSON line, returns the exit status."""
    return measuring.end(measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
