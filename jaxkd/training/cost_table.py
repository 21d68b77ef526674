"""A table of what the networks of a config cost, layer by layer.

The command is `python -m jaxkd.analysis.costs --config=FILE.py[:variant]`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxkd.analysis.layer_costs import xla_flops
from jaxkd.training.assembly import untrained
from jaxkd.training.config import apply_overrides, load_config, parse_overrides
from jaxkd.training.loop import load_variables
from jaxkd.training.network import Network, Variables
from jaxkd.training.networks import costs_of
from jaxkd.training.plan import Plan
from jaxkd.training.schema import ConfigError
from jaxkd.training.setup import Setup, make_setup
from jaxkd.training.workdir import Workdir

_COLUMNS = (
    ("parameters", "params", 1),
    ("density", "density", None),
    ("MMAC", "macs", 1e6),
    ("effective MMAC", "effective_macs", 1e6),
    ("weights, KiB", "bytes", 1024),
    ("activations, KiB", "activation_bytes", 1024),
    ("peak, KiB", "peak_bytes", 1024),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table for every network of a config; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxkd.analysis.costs",
        description="Parameters, operations and memory of the networks of a config, by "
        "layer, for one image in evaluation.",
        epilog="Further arguments --config.KEY=VALUE change values of the config.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:VARIANT]")
    parser.add_argument("--network", help="one network alone")
    parser.add_argument(
        "--workdir",
        type=Path,
        help="a run of this config that is finished: masks are those it ended with",
    )
    known, rest = parser.parse_known_args(arguments)
    try:
        config = apply_overrides(load_config(known.config), parse_overrides(rest))
        setup = make_setup(Plan.from_config(config))
        if known.network is not None and known.network not in setup.networks:
            raise ConfigError(
                f"--network: no network {known.network!r}; the config has "
                f"{', '.join(setup.networks)}"
            )
        for name, network in setup.networks.items():
            if known.network in (None, name):
                variables = _variables(setup, name, known.workdir)
                print(describe(name, network, variables, _image(setup)))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def describe(
    name: str, network: Network, variables: Variables, shape: Sequence[int]
) -> str:
    """The table of a network as Markdown, with XLA's own count beneath it."""
    costs = costs_of(network, variables, shape)
    heads = ["layer", *(head for head, _, _ in _COLUMNS)]
    rows = [heads, ["---"] + ["---:"] * len(_COLUMNS)]
    for layer in costs.layers:
        rows.append([layer.path or "(itself)", *_cells(layer)])
    total = [
        f"{costs.density:.3f}" if scale is None else _number(costs.total(key), scale)
        for _, key, scale in _COLUMNS
    ]
    rows.append(["**all**", *total])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    images = jnp.zeros((1, *shape), jnp.float32)
    flops = xla_flops(
        lambda v, x: network.apply(v, x, train=False, key=None)[0].logits,
        variables,
        images,
    )
    size = "x".join(map(str, shape))
    note = f"{name}, one image of {size} in evaluation. Masked weights are counted as "
    note += "if they cost nothing, which dense hardware does not do."
    if flops:
        share = 2 * costs.total("macs") / flops
        note += (
            f" XLA counts {flops / 1e6:,.1f} MFLOP for its program, all arithmetic "
            f"included; products are {share:.0%} of that."
        )
    return "\n".join([*lines, "", note, ""])


def _cells(layer: Any) -> list[str]:
    return [
        f"{layer.density:.3f}" if scale is None else _number(getattr(layer, key), scale)
        for _, key, scale in _COLUMNS
    ]


def _number(value: float, scale: float) -> str:
    if scale == 1:
        return f"{value:,.0f}"
    value /= scale
    return f"{value:,.2f}" if value >= 1 or not value else f"{value:.3g}"


def _image(setup: Setup) -> tuple[int, ...]:
    """The shape of an image as the networks see it."""
    record = setup.plan.data.augment.evaluate(
        {k: jnp.asarray(v)[None] for k, v in setup.train[0].items()}
    )
    return tuple(record["image"].shape[1:])


def _variables(setup: Setup, name: str, path: Path | None) -> Variables:
    if path is None:
        return setup.seeds.each(untrained(setup, name))[0]
    workdir = Workdir(path)
    summary = workdir.summary()
    if not summary or not summary.get("stages"):
        raise ConfigError(f"--workdir: {path} holds no finished stage")
    finished = [stage["name"] for stage in summary["stages"]]
    trained = {n for s in setup.stages if s.name in finished for n in s.learners}
    if name not in trained and not setup.plan.networks[name].frozen:
        raise ConfigError(f"--workdir: no finished stage of {path} trained {name!r}")
    return setup.seeds.each(load_variables(setup, workdir, name, finished))[0]
