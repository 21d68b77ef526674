"""configs/sparse.py: every variant makes a plan, and the smoke variant runs."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxkd import main as main_lib
from jaxkd.training import Plan, load_config, make_setup
from jaxkd.training.loop import load_variables
from jaxkd.training.schema import ConfigError
from jaxkd.training.workdir import Workdir

CONFIG = Path(__file__).parents[2] / "configs" / "sparse.py"
METHODS = ("static", "set", "rigl", "granet", "gmp")


def plan_of(variant):
    return Plan.from_config(load_config(f"{CONFIG}:{variant}"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_alone_and_taught(method):
    alone, taught = plan_of(method), plan_of(f"{method}-kd")
    assert list(alone.stages) == ["dense", "sparse"]
    assert list(taught.stages) == ["teacher", "student_alone", "student"]
    for network in (alone.networks["sparse"], taught.networks["student"]):
        assert network.name == "resnet18"
        assert dict(network.compress) == {method: {"sparsity": 0.9}}
    assert not alone.networks["dense"].compress
    assert not taught.networks["teacher"].compress
    assert taught.stages["student"].teachers == ("teacher",)
    for stage in (*alone.stages.values(), *taught.stages.values()):
        assert stage.epochs == 200 and stage.optimizer.nesterov
        assert stage.optimizer.milestones == (60, 120, 160)


def test_digits_compares_all_of_them():
    plan = plan_of("digits")
    assert list(plan.stages) == ["dense", *METHODS]
    setup = make_setup(plan)
    for name in METHODS:
        variables = jax.eval_shape(setup.networks[name].init, jax.random.key(0))
        assert len(variables["compression"][name]["masks"]) == 8


def test_unknown_variants_are_named():
    with pytest.raises(ConfigError, match="has no variant 'rigel'; take one of digits"):
        plan_of("rigel")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse") / "run"
    assert main_lib.main([f"--config={CONFIG}:smoke", f"--workdir={path}"]) == 0
    return path


@pytest.mark.slow
def test_the_smoke_run_logs_densities(run):
    records = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    facts = [r["facts"] for r in records if "facts" in r]
    assert facts
    for found in facts:
        assert found["rigl/target_density"] == pytest.approx(0.1)
        # The first exchange corrects what the Bernoulli masks lack, not their excess.
        assert 0.099 <= found["rigl/density"] < 0.12
    assert {r["stage"] for r in records if "facts" in r} == {"student_alone", "student"}


def test_the_smoke_run_stores_sparse_weights_and_their_masks(run):
    setup = make_setup(plan_of("smoke"))
    variables = load_variables(
        setup, Workdir(run), "student", ["teacher", "student_alone", "student"]
    )
    masks = variables["compression"]["rigl"]["masks"]
    assert len(masks) == 8
    for path, mask in masks.items():
        kernel = variables["params"]
        for part in path.split("/"):
            kernel = kernel[part]
        mask = np.asarray(mask)
        assert mask.dtype == bool and 0 < mask.mean() < 0.3
        assert (np.asarray(kernel)[~mask] == 0).all()
    stem = np.asarray(variables["params"]["trunk"]["stem"]["kernel"])
    assert (stem != 0).all()
