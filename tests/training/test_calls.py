"""How long calls may be, and when their items are too many for the host."""

import pytest

from jaxkd.training import ConfigError, Plan, calls, sharding
from jaxkd.training.calls import calls_ahead, choose_steps, longest_call, periods

# A record of `stored_config`: an 8x8 uint8 image, an int32 label, an int32 number.
RECORD = 64 + 4 + 4
STEP = 16 * RECORD


@pytest.fixture
def limit(monkeypatch):
    """Sets what the items of a call may take."""
    return lambda size: monkeypatch.setattr(calls, "LARGEST_CALL_BYTES", size)


@pytest.fixture
def streamed(stored_setup):
    def make(steps_per_call="epoch", **changes):
        train = {"resident": False, "steps_per_call": steps_per_call}
        return stored_setup(train=train, **changes)

    return make


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (10, 10)),
        ({"evaluation": {"every_epochs": None}}, (10,)),
        ({"evaluation": {"every_epochs": 3}}, (10, 30)),
        ({"checkpoint": {"every_steps": 4}}, (4, 10)),
    ],
)
def test_stages_are_judged_and_saved_again_and_again(stored_config, changes, expected):
    assert periods(Plan.from_config(stored_config(**changes)), 10) == expected


@pytest.mark.parametrize(
    ("steps_per_call", "changes", "expected"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (100, {}, 3),
        ("epoch", {}, 3),
        ("epoch", {"checkpoint": {"every_steps": 2}}, 2),
        (
            100,
            {"evaluation": {"every_epochs": None}, "checkpoint": {"every_steps": 50}},
            6,
        ),
    ],
)
def test_a_call_goes_to_the_next_stop_at_most(
    streamed, steps_per_call, changes, expected
):
    setup = streamed(steps_per_call, **changes)
    assert longest_call(setup.plan, setup.stages[0]) == expected


@pytest.mark.parametrize(
    ("wanted", "compiled", "expected"),
    [
        (5, (), 5),
        (5, (5, 3), 5),
        (4, (5, 3), 4),
        (1, (5, 3, 7), 1),
        (3, (5, 3, 7), 3),
        # A fourth beside that of one step would be one too many.
        (4, (5, 3, 7), 3),
        (6, (5, 3, 7), 5),
        (2, (5, 3, 7), 1),
        (4, (5, 3, 1), 4),
        (2, (5, 3, 1, 4), 1),
    ],
)
def test_at_most_four_programs_of_which_one_has_one_step(wanted, compiled, expected):
    assert choose_steps(wanted, compiled) == expected


def test_the_host_is_a_few_steps_ahead_or_one_call():
    assert [calls_ahead(steps) for steps in (1, 2, 3, 100)] == [3, 1, 1, 1]


@pytest.mark.parametrize("several", [1, 3, 8, 100])
def test_all_steps_are_made_and_no_call_goes_past_a_stop(several):
    compiled, step, stops = set(), 0, {*range(0, 200, 7), *range(0, 200, 10), 199}
    while step < 199:
        to_go = min(stop for stop in stops if stop > step) - step
        steps = choose_steps(min(several, to_go), compiled)
        assert 1 <= steps <= min(several, to_go)
        compiled.add(steps)
        step += steps
    assert step == 199 and len({1, *compiled}) <= 4


def test_calls_that_fit_exactly_are_allowed(streamed, limit):
    limit(3 * STEP)
    streamed()
    limit(STEP - 1)
    # One step is what every loop sends.
    streamed(1)


def test_a_call_that_is_too_long_names_what_fits_and_the_other_way(streamed, limit):
    limit(3 * STEP - 1)
    with pytest.raises(ConfigError) as error:
        streamed()
    text = str(error.value)
    assert text.startswith("config.train.steps_per_call: a call of stage 'student'")
    assert "would stack 3 steps, 1 MiB" in text and "set it to 2 or less" in text
    assert "config.train.resident=True" in text and "\n" not in text


def test_resident_records_are_not_sent(stored_setup, limit):
    limit(1)
    stored_setup(train={"resident": True, "steps_per_call": "epoch"})


def test_stored_answers_are_sent_in_any_case(stored_setup, limit):
    # Four logits in float32 for each of 16 records.
    train = {"resident": True, "steps_per_call": "epoch"}
    targets = {"views": 2}
    limit(3 * 16 * 4 * 4)
    setup = stored_setup(train=train, targets=targets)
    assert setup.stages[0].stored is not None
    limit(3 * 16 * 4 * 4 - 1)
    with pytest.raises(ConfigError, match="set it to 2 or less$"):
        stored_setup(train=train, targets=targets)


def test_unlabelled_records_count_as_well(stored_setup, limit):
    data = {"labelled_fraction": 0.5, "unlabelled_batch_size": 16, "batch_size": 8}
    changes = {
        "train": {"steps_per_call": 2},
        "data": data,
        "student": {"method": {"ce": {}}, "teachers": ()},
    }
    limit(2 * (8 + 16) * RECORD)
    stored_setup(**changes)
    limit(2 * (8 + 16) * RECORD - 1)
    with pytest.raises(ConfigError, match="set it to 1 or less"):
        stored_setup(**changes)


def test_every_seed_has_items_of_its_own(streamed, limit):
    limit(2 * 3 * STEP)
    streamed(seeds=(1, 2))
    limit(2 * 3 * STEP - 1)
    with pytest.raises(ConfigError, match="set it to 2 or less"):
        streamed(seeds=(1, 2))


def test_a_process_stacks_its_own_part(streamed, limit, monkeypatch):
    setup = streamed()
    (stage,) = setup.stages
    given = {"train": setup.train, "unlabelled": None, "resident": False}
    limit(3 * STEP // 2)
    monkeypatch.setattr(sharding, "process_part", lambda mesh: (0, 2))
    calls.check_call(setup.plan, stage, setup.mesh, **given)
    monkeypatch.undo()
    limit(3 * STEP // 2)
    with pytest.raises(ValueError, match="set it to 1 or less"):
        calls.check_call(setup.plan, stage, setup.mesh, **given)
