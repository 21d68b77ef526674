"""configs/sparse_ift.py: every variant makes a plan, and the smoke variant runs."""

import json
from pathlib import Path

import jax
import pytest

from jaxkd import main as main_lib
from jaxkd.training import Plan, load_config, make_setup
from jaxkd.training.schema import ConfigError

CONFIG = Path(__file__).parents[2] / "configs" / "sparse_ift.py"
FAMILIES = ("wide", "parallel", "factorized", "doped")


def plan_of(variant):
    return Plan.from_config(load_config(f"{CONFIG}:{variant}"))


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_published_recipe(family, taught):
    plan = plan_of(f"{family}-kd" if taught else family)
    assert list(plan.stages) == ["dense", "student"]
    assert not plan.networks["dense"].compress
    student = plan.networks["student"]
    assert student.name == "resnet18" and student.options["stem"] == "cifar"
    options = dict(student.compress["sparse_ift"])
    assert (options["family"], options["sparsity"]) == (family, 0.75)
    assert options["updates"] == "rigl" and options["schedule"]["frequency"] == 100
    assert plan.stages["student"].teachers == (("dense",) if taught else ())
    assert plan.data.batch_size == 128
    for stage in plan.stages.values():
        optimizer = stage.optimizer
        assert stage.epochs == 200 and optimizer.nesterov
        assert optimizer.learning_rate == 0.1 and optimizer.factor == 0.2
        assert optimizer.milestones == (61, 121, 161)
        assert (optimizer.weight_decay, optimizer.weight_decay_mask) == (5e-4, "all")


@pytest.mark.parametrize(
    ("variant", "family", "sparsity", "teachers"),
    [
        ("parallel-0.5", "parallel", 0.5, ()),
        ("wide-kd-0.9", "wide", 0.9, ("dense",)),
        ("smoke", "wide", 0.75, ()),
        ("smoke-kd", "wide", 0.75, ("dense",)),
        ("smoke-doped-0.5", "doped", 0.5, ()),
    ],
)
def test_parts_of_a_variant(variant, family, sparsity, teachers):
    plan = plan_of(variant)
    options = plan.networks["student"].compress["sparse_ift"]
    assert (options["family"], options["sparsity"]) == (family, sparsity)
    assert plan.stages["student"].teachers == teachers
    assert (plan.data.source == "digits") == variant.startswith("smoke")


@pytest.mark.parametrize("variant", ["wild", "wide-0.5-kd", "wide-1.5", "smoke-no"])
def test_unknown_variants_are_named(variant):
    with pytest.raises(ConfigError, match=f"has no variant '{variant}'; take wide"):
        plan_of(variant)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fits_the_network(family):
    setup = make_setup(plan_of(f"smoke-{family}-kd"))
    variables = jax.eval_shape(setup.networks["student"].init, jax.random.key(0))
    masks = variables["compression"]["sparse_ift"]["masks"]
    assert len(masks) == {"factorized": 14, "doped": 6}.get(family, 8)


def test_a_sparsity_that_costs_something_else_ends_the_plan():
    with pytest.raises(ConfigError, match="student.*sparsity 0.6 is not iso-FLOP"):
        make_setup(plan_of("smoke-parallel-0.6"))


@pytest.mark.slow
def test_the_smoke_run_keeps_the_cost(tmp_path):
    path = tmp_path / "run"
    assert main_lib.main([f"--config={CONFIG}:smoke", f"--workdir={path}"]) == 0
    records = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
    facts = [
        r["facts"] for r in records if r.get("stage") == "student" and "facts" in r
    ]
    assert facts
    for found in facts:
        assert found["sparse_ift/flops_share"] == pytest.approx(1, abs=0.1)
        assert found["sparse_ift/density"] < 0.35
