"""Reference vectors, and the harness that reads them."""

import numpy as np
import pytest


def test_adapter_reproduces_the_file(golden_case):
    golden_case.check()


def test_every_file_has_an_adapter(golden_missing, golden_strict):
    if golden_strict and golden_missing:
        pytest.fail(f"no adapter for {', '.join(golden_missing)}", pytrace=False)


VALUES = {
    "in_t0": np.float32(2),
    "in_t10": np.float32(5),
    "in_t2": np.float32(3),
    "hp_power": np.int64(2),
    "grad_t10": np.float32(10),
    "out_loss": np.float32(38),
    "tolerance": "rtol 1e-5, atol 1e-6",
}


def sum_of_powers(v):
    power = v.hp("power")
    return v.differentiate(lambda x: sum(x[key] ** power for key in v.keys(r"in_t\d+")))


def test_harness_accepts_right_values_and_gradients(make_case, tmp_path):
    make_case(tmp_path / "distill_x.npz", VALUES, sum_of_powers).check()


def test_harness_orders_numbered_keys_by_number(make_case, tmp_path):
    case = make_case(tmp_path / "distill_x.npz", VALUES, sum_of_powers)
    assert case.vectors.keys(r"in_t\d+") == ["in_t0", "in_t2", "in_t10"]


@pytest.mark.parametrize("key", ["out_loss", "grad_t10"])
def test_harness_rejects_a_wrong_value(make_case, tmp_path, key):
    wrong = {**VALUES, key: VALUES[key] * np.float32(1.001)}
    case = make_case(tmp_path / "distill_x.npz", wrong, sum_of_powers)
    with pytest.raises(pytest.fail.Exception, match=f"{key}: largest difference"):
        case.check()


def test_harness_rejects_a_wrong_shape(make_case, tmp_path):
    wrong = {**VALUES, "out_loss": np.float32([38, 38])}
    case = make_case(tmp_path / "distill_x.npz", wrong, sum_of_powers)
    with pytest.raises(pytest.fail.Exception, match=r"shape \(\), expected \(2,\)"):
        case.check()


def test_harness_rejects_nan_where_a_number_is_expected(make_case, tmp_path):
    case = make_case(
        tmp_path / "distill_x.npz",
        {"out_loss": np.float32(1)},
        lambda v: {"out_loss": np.float32(np.nan)},
    )
    with pytest.raises(pytest.fail.Exception, match="out_loss"):
        case.check()


def test_harness_rejects_an_array_that_nobody_looked_at(make_case, tmp_path):
    more = {**VALUES, "hp_margin": np.float64(0.5), "out_part": np.float32(1)}
    case = make_case(tmp_path / "distill_x.npz", more, sum_of_powers)
    with pytest.raises(pytest.fail.Exception) as error:
        case.check()
    assert "hp_margin: neither read" in str(error.value)
    assert "out_part: neither read" in str(error.value)


def test_harness_rejects_an_input_that_the_loss_ignores(make_case, tmp_path):
    more = {**VALUES, "in_mask": np.float32(1), "w_scale": np.float32(1)}
    case = make_case(tmp_path / "distill_x.npz", more, sum_of_powers)
    with pytest.raises(pytest.fail.Exception) as error:
        case.check()
    assert "in_mask: neither read" in str(error.value)
    assert "w_scale: neither read" in str(error.value)


def test_harness_accepts_an_array_skipped_with_a_reason(make_case, tmp_path):
    more = {**VALUES, "out_part": np.float32(1)}
    reason = {"out_part": "a known error of the reference"}
    make_case(tmp_path / "distill_x.npz", more, sum_of_powers, reason).check()


def test_harness_rejects_a_result_that_the_file_lacks(make_case, tmp_path):
    case = make_case(
        tmp_path / "distill_x.npz",
        VALUES,
        lambda v: {**sum_of_powers(v), "out_extra": np.float32(0)},
    )
    with pytest.raises(pytest.fail.Exception, match="out_extra: not in the file"):
        case.check()


def test_harness_uses_the_tolerance_of_the_file(make_case, tmp_path):
    loose = {"out_loss": np.float32(1), "tolerance": "rtol 1e-2, atol 0 (rounding)"}
    make_case(
        tmp_path / "distill_x.npz", loose, lambda v: {"out_loss": np.float32(1.005)}
    ).check()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rtol 1e-4, atol 1e-5 (distances)", (1e-4, 1e-5)),
        ("rtol=1e-4, atol=.5", (1e-4, 0.5)),
        ("rtol 1E-4.", (1e-4, 1e-6)),
        ("atol: 0", (1e-5, 0.0)),
        ("default", (1e-5, 1e-6)),
    ],
)
def test_harness_takes_the_default_where_the_file_states_no_tolerance(
    make_case, tmp_path, text, expected
):
    values = {"out_loss": np.float32(1), "tolerance": text}
    case = make_case(tmp_path / "distill_x.npz", values, None)
    assert case.vectors.tolerance("out_loss") == expected
