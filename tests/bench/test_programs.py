"""The programs that the scripts of bench/ time are those of the command."""

import numpy as np
import pytest

RECORDS = 32


@pytest.fixture(scope="module")
def programs(script):
    return script("programs")


@pytest.fixture(scope="module")
def data(script, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "synthetic.npz"
    return script("synthetic").write_cifar(path, train=RECORDS, test=8, classes=4)


@pytest.fixture(scope="module")
def configured(programs, data, tiny):
    def configured(**train):
        return programs.configured(
            f"kd.py:{tiny}-{tiny}",
            {
                "data.source": "npz",
                "data.path": data,
                "data.batch_size": 8,
                "networks.teacher.frozen": True,
                "networks.student.width_factor": 0.5,
                "run": ("student",),
                **{f"train.{key}": value for key, value in train.items()},
            },
        )

    return configured


def training(programs, config, **options):
    setup = programs.set_up(config)
    return programs.Training(setup, setup.stages[0], **options)


def test_values_are_changed_as_on_the_command_line(configured, data):
    config = configured(resident=False, steps_per_call="epoch")
    assert config["data"]["path"] == str(data)
    assert config["run"] == ("student",)
    assert config["networks"]["teacher"]["frozen"] is True
    assert config["train"] == {"resident": False, "steps_per_call": "epoch"}


def test_a_wrong_config_is_a_mistake_in_one_line(programs, configured):
    mistake = programs.Mistake
    with pytest.raises(mistake, match="no file"):
        programs.configured("nothing.py:a", {})
    with pytest.raises(mistake, match="config.train.nothing: unknown key"):
        programs.set_up(configured(nothing=1))


def test_calls_of_several_steps_end_where_single_steps_do(programs, configured):
    single = training(programs, configured(steps_per_call=1))
    several = training(programs, configured(steps_per_call=2, resident=True))
    assert (single.images, several.images) == (8, 16)
    assert np.isclose(single.run(4), several.run(2), rtol=1e-4)
    assert single.programs.flops_per_step == several.programs.flops_per_step > 0
    assert single.parameters.keys() == {"teacher", "student"}
    assert single.parameters["teacher"] > single.parameters["student"]
    for each in (single, several):
        each.close()


def test_a_round_has_whole_calls(programs, configured):
    each = training(programs, configured(steps_per_call=2))
    assert each.side(steps=6).calls == 3
    with pytest.raises(programs.Mistake, match="2 steps per call do not divide 3"):
        each.side(steps=3)
    each.close()


def test_repeated_items_need_no_more_data(programs, configured):
    config = configured(resident=True)
    config["stages"]["student"].update(epochs=1)
    config["stages"]["student"]["optimizer"].update(schedule="constant", milestones=())
    each = training(programs, config, repeat=True)
    # More steps than the stage has.
    assert np.isfinite(each.run(2 * RECORDS // 8))
    each.close()
    other = training(programs, config)
    with pytest.raises(StopIteration):
        other.run(1 + RECORDS // 8)
    other.close()


def test_the_recipes_are_those_of_the_configs(programs):
    assert "kd" in programs.recipes().RECIPES
