"""Images per second of a network, dense and without the channels that were pruned.

    python bench/shrink.py
    python bench/shrink.py --network=resnet50 --image-size=224 --device=gpu

prints one JSON line; `ratio` is the shrunk network's speed over that of the dense one.
Of every layer whose outputs can be taken away, the share `--keep` of the channels with
the largest kernels stays; weights are untrained, which changes no shapes. `masked` is
the network with the same channels closed but not taken away: masks alone gain nothing.
The sides take turns within one process, round by round, on images that lie ready, in
evaluation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import measuring
from measuring import Mistake, Side


class Options(NamedTuple):
    """What is measured."""

    network: str
    keep: float
    batch_size: int
    image_size: int
    classes: int
    device: str
    calls: int
    rounds: int
    threads: int


def parse(arguments: Sequence[str] | None) -> Options:
    """Reads and checks the command line."""
    parser = measuring.Parser("shrink.py", __doc__)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the channels")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--device", choices=measuring.DEVICES, default="cpu")
    parser.add_argument("--calls", type=int, default=5, help="per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, default=measuring.usable_cores(), help="on the CPU"
    )
    options = Options(**vars(parser.parse_args(arguments)))
    measuring.at_least(
        options, 1, "batch_size", "image_size", "classes", "calls", "rounds", "threads"
    )
    if not 0 < options.keep <= 1:
        raise Mistake(f"--keep must be in (0, 1], got {options.keep}")
    return options


def make_sides(options: Options) -> tuple[dict[str, Side], dict[str, Any]]:
    """The sides, and the sizes of the networks."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxkd import models
    from jaxkd.sparsity.channels import find_channels
    from jaxkd.sparsity.pdp import channel_norms
    from jaxkd.sparsity.shrink import close_channels
    from jaxkd.training.network import from_linen
    from jaxkd.training.networks import network_costs
    from jaxkd.training.shrunk import shrunk

    if options.network not in models.names():
        raise Mistake(
            f"--network: no network {options.network!r}; known: "
            f"{', '.join(models.names())}"
        )
    shape = (options.image_size, options.image_size, 3)
    module = models.create(options.network, num_classes=options.classes)
    dense = from_linen(options.network, module, shape)
    variables = jax.jit(dense.init)(jax.random.key(0))

    def logits(variables: Any, images: Any) -> Any:
        return dense.apply(variables, images, train=False, key=None)[0].logits

    channels = find_channels(dense.init, logits, shape)
    if not channels.free:
        raise Mistake(f"--network: no channels of {options.network!r} can be pruned")
    keep = {}
    for path in channels.free:
        kernel = variables["params"]
        for name in path.split("/"):
            kernel = kernel[name]
        norms = np.asarray(channel_norms(kernel["kernel"]))
        keep[path] = np.zeros(len(norms), bool)
        count = max(1, round(options.keep * len(norms)))
        keep[path][np.argsort(-norms)[:count]] = True
    closed = close_channels(channels, variables, keep)
    small, own = shrunk(dense, closed, shape, keep=keep)
    images = jax.random.normal(jax.random.key(1), (options.batch_size, *shape))

    def side(network: Any, variables: Any) -> Side:
        @jax.jit
        def program(variables: Any, images: Any) -> Any:
            return network.apply(variables, images, train=False, key=None)[0].logits

        def run(calls: int) -> float:
            result = jnp.zeros(())
            for _ in range(calls):
                result = program(variables, images)
            return float(jnp.sum(result))

        return Side(run, options.batch_size, options.calls)

    def costs(network: Any, variables: Any) -> dict[str, Any]:
        found = network_costs(network, variables, shape)
        return {"parameters": found.params, "macs": found.macs}

    sides = {
        "dense": side(dense, variables),
        "masked": side(dense, closed),
        "shrunk": side(small, own),
    }
    return sides, {"dense": costs(dense, variables), "shrunk": costs(small, own)}


def summarise(
    options: Options,
    rates: dict[str, list[float]],
    costs: dict[str, Any],
    *,
    load: float | None,
) -> dict[str, Any]:
    """The line to print."""
    return {
        "benchmark": "shrink",
        "ratio": measuring.ratio_of(rates["shrunk"], rates["dense"]),
        "ratio_of_masked": measuring.ratio_of(rates["masked"], rates["dense"]),
        "images_per_second": {k: measuring.spread(v) for k, v in rates.items()},
        "costs": costs,
        **{k: v for k, v in options._asdict().items() if k != "device"},
        "device": measuring.device_name(options.device),
        "load": load,
        "versions": measuring.versions(),
    }


def measure(arguments: Sequence[str] | None) -> dict[str, Any]:
    """Measures what the command line asks for."""
    options = parse(arguments)
    load = measuring.load()
    measuring.limit_threads(options.threads)
    measuring.use_device(options.device)
    sides, costs = make_sides(options)
    rates = measuring.take_turns(sides, rounds=options.rounds)
    return summarise(options, rates, costs, load=load)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints one JSON line, returns the exit status."""
    return measuring.end(measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
