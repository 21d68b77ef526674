import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import distill

METHODS = {
    "bce_dice",
    "ce",
    "dice",
    "emkd",
    "focal",
    "focal_dice",
    "hifd",
    "hlfd",
    "ifd",
    "kd",
    "seg_at",
    "seg_deep",
    "seg_skd",
}


def test_every_documented_method_is_registered():
    assert set(distill.names()) >= METHODS
    assert distill.names() == sorted(distill.names())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_works_with_its_defaults(name):
    method = distill.create(name)
    assert method.weights
    assert method.num_teachers == (
        0 if "dice" in name or name in ("ce", "focal") else 1
    )


def test_unknown_method_suggests_the_nearest():
    with pytest.raises(KeyError, match="no method 'hlfdd'; did you mean 'hlfd'"):
        distill.create("hlfdd")


def test_unknown_option_suggests_the_nearest():
    with pytest.raises(TypeError, match="no option 'temprature'.*'temperature'"):
        distill.create("kd", temprature=4.0)


def test_option_of_a_wrong_type_is_named():
    with pytest.raises(TypeError, match="a number or a schedule, got 'hot'"):
        distill.create("kd", temperature="hot")


@pytest.mark.parametrize("option", ["weight", "name"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_method_has_an_option_that_configs_keep_for_its_part(method, option):
    with pytest.raises(TypeError, match=f"no option '{option}'"):
        distill.create(method, **{option: 1.0})


class TestWeighted:
    def test_multiplies_the_weights_of_its_parts(self):
        method = distill.weighted({"ce": 0.5, "hlfd": 2.0}, hlfd={"alpha": 0.2})
        assert method.weights == {"ce": 0.5, "hlfd/flfd": 1.8, "hlfd/plfd": 0.4}

    def test_needs_as_many_teachers_as_its_part_with_the_most(self):
        assert distill.weighted({"ce": 1.0}).num_teachers == 0
        assert distill.weighted({"ce": 1.0, "kd": 1.0}).num_teachers == 1

    def test_gives_options_to_their_part(self, classification):
        method = distill.weighted({"ce": 0.1, "kd": 0.9}, kd={"temperature": 2.0})
        alone = distill.create("kd", temperature=2.0)
        np.testing.assert_array_equal(
            classification.terms(method)["kd"], classification.terms(alone)["kd"]
        )

    def test_one_method_may_take_part_twice(self, classification):
        method = distill.weighted(
            {"soft": 0.5, "softer": 0.5},
            soft={"name": "kd", "temperature": 2.0},
            softer={"name": "kd", "temperature": 8.0},
        )
        values = classification.terms(method)
        for part, temperature in (("soft", 2.0), ("softer", 8.0)):
            alone = distill.create("kd", temperature=temperature)
            expected = classification.terms(alone)["kd"]
            np.testing.assert_array_equal(values[f"{part}/kd"], expected)

    def test_weights_may_be_schedules(self):
        method = distill.weighted({"ce": lambda step: 0.1 * step, "hlfd": 1.0})
        weight = distill.weight_at(method.weights["ce"], jnp.array(3))
        np.testing.assert_allclose(weight, 0.3)

    def test_a_schedule_multiplies_the_weights_inside_its_part(self):
        method = distill.weighted({"hlfd": lambda step: jnp.minimum(step / 10, 1.0)})
        weight = distill.weight_at(method.weights["hlfd/plfd"], jnp.array(5))
        np.testing.assert_allclose(weight, 0.05)

    def test_options_are_not_consumed(self):
        options = {"name": "kd", "temperature": 2.0}
        distill.weighted({"soft": 1.0}, soft=options)
        assert options == {"name": "kd", "temperature": 2.0}

    def test_options_for_a_part_that_is_not_there_are_an_error(self):
        with pytest.raises(ValueError, match="for 'kdd'.*did you mean 'kd'"):
            distill.weighted({"kd": 1.0}, kdd={"temperature": 2.0})

    @pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
    def test_impossible_weights_are_an_error(self, weight):
        with pytest.raises(ValueError, match="weight of 'ce' must be a finite number"):
            distill.weighted({"ce": weight})

    def test_no_parts_are_an_error(self):
        with pytest.raises(ValueError, match="at least one part"):
            distill.weighted({})

    def test_an_unknown_part_is_an_error(self):
        with pytest.raises(KeyError, match="no method 'kkd'"):
            distill.weighted({"kkd": 1.0})
