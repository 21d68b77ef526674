"""configs/prune.py: every variant makes a plan, and the smoke variant runs."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import main as main_lib
from jaxkd.training import Plan, load_config, make_setup
from jaxkd.training.loop import load_variables
from jaxkd.training.schema import ConfigError
from jaxkd.training.shrunk import shrunk
from jaxkd.training.workdir import Workdir

CONFIG = Path(__file__).parents[2] / "configs" / "prune.py"


def plan_of(variant):
    return Plan.from_config(load_config(f"{CONFIG}:{variant}"))


@pytest.mark.parametrize(
    ("variant", "compress"),
    [
        ("pdp", {"pdp": {"sparsity": 0.9}}),
        ("pdp-nm", {"pdp": {"structure": "n:m", "n": 2, "m": 4}}),
        (
            "pdp-channel",
            {"pdp": {"sparsity": 0.5, "structure": "channel", "temperature": 0.01}},
        ),
        ("lapp", {"lapp": {"flops": 0.5}}),
    ],
)
def test_a_pruned_network_beside_a_dense_one(variant, compress):
    plan = plan_of(variant)
    assert list(plan.stages) == ["dense", "pruned"]
    assert {k: dict(v) for k, v in plan.networks["pruned"].compress.items()} == compress
    assert not plan.networks["dense"].compress
    assert plan.stages["pruned"].epochs == 240


@pytest.mark.parametrize("variant", ["gmp-kd", "pdp-kd"])
def test_a_pruned_student_beside_its_teacher(variant):
    plan = plan_of(variant)
    assert list(plan.stages) == ["teacher", "student"]
    assert plan.stages["student"].teachers == ("teacher",)
    name = variant.removesuffix("-kd")
    assert plan.networks["student"].compress[name]["sparsity"] == 0.9


def test_unknown_variants_are_named():
    with pytest.raises(ConfigError, match="has no variant 'pdq'; take one of pdp"):
        plan_of("pdq")


@pytest.mark.slow
def test_the_smoke_run_ends_with_a_network_that_can_be_made_smaller(tmp_path):
    path = tmp_path / "run"
    assert main_lib.main([f"--config={CONFIG}:smoke", f"--workdir={path}"]) == 0
    records = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
    densities = [r["facts"]["pdp/density"] for r in records if "facts" in r]
    # One dense epoch, then the whole ramp in one step.
    assert densities[0] == 1.0 and 0.4 <= densities[-1] < 0.6

    setup = make_setup(plan_of("smoke"))
    variables = load_variables(setup, Workdir(path), "pruned", ["pruned"])
    network, shape = setup.networks["pruned"], (8, 8, 1)
    plain = network.upkeep.plain
    final = network.upkeep.finalise(variables)
    small, own = shrunk(network, variables, shape)
    images = jax.random.uniform(jax.random.key(0), (2, *shape))
    wanted, _ = plain.apply(final, images, train=False, key=None)
    got, _ = small.apply(own, images, train=False, key=None)
    np.testing.assert_allclose(got.logits, wanted.logits, rtol=1e-5, atol=1e-5)

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree["params"]))

    assert count(own) < 0.8 * count(final)
    assert jnp.isfinite(got.logits).all()
