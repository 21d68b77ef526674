"""Averages in few bits: rounding, error feedback, and what it sends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.analysis.collectives import read_collectives, sum_up
from jaxkd.exchange import quantized
from jaxkd.exchange.quantized import (
    pack_halves,
    part_size,
    quantize,
    unpack_halves,
)

KEY = jax.random.key(0)


def test_codes_are_the_integers_next_to_the_scaled_numbers():
    codes, scale = quantize(jnp.asarray([-7.0, 3.4, 3.6, 0.0]), bits=4)
    assert scale == 1.0 and codes.dtype == jnp.int8
    np.testing.assert_array_equal(codes, [-7, 3, 4, 0])
    codes, scale = quantize(jnp.zeros(3), bits=8)
    assert scale == 0 and (codes == 0).all()


def test_rounding_by_chance_is_right_on_average():
    x = jnp.asarray([1.0, 0.3, -0.77, 0.01])
    noise = jax.random.uniform(KEY, (4000, 4))
    codes, scale = jax.vmap(lambda n: quantize(x, bits=3, noise=n))(noise)
    mean = (codes * scale[:, None]).mean(0)
    # A number between two integers has a standard error of 1/3 * 0.5 / sqrt(4000).
    np.testing.assert_allclose(mean, x, atol=5 / 3 * 0.5 / np.sqrt(4000))


def test_halves_share_bytes_and_come_back():
    codes = jnp.arange(-8, 8, dtype=jnp.int8).reshape(2, 8)
    packed = pack_halves(codes)
    assert packed.shape == (2, 4) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack_halves(packed), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_workers_agree_and_are_as_close_as_two_roundings(
    params, drawn, copies, workers, bits
):
    exchange = quantized(bits=bits, devices=8)
    step, state = workers(exchange), copies(exchange.init(params))
    gradients = drawn(0)
    new, state = step(gradients, state, 0, KEY)
    kernel, mean = new["head"]["kernel"], gradients["head"]["kernel"].mean(0)
    assert (kernel == kernel[0][None]).all()
    levels = 2 ** (bits - 1) - 1
    bound = 0.5 * float(jnp.abs(gradients["head"]["kernel"]).max()) / levels
    bound += 0.5 * (float(jnp.abs(mean).max()) + bound) / levels
    assert float(jnp.abs(kernel[0] - mean).max()) <= bound * 1.001
    bias = gradients["conv"]["bias"].mean(0)
    np.testing.assert_allclose(new["conv"]["bias"][0], bias, atol=1e-6)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_what_is_not_sent_is_kept(params, drawn, copies, workers, rounding):
    exchange = quantized(bits=3, rounding=rounding, devices=8)
    step, state = workers(exchange), copies(exchange.init(params))
    applied, given = jnp.zeros((40, 30)), jnp.zeros((40, 30))
    for i in range(3):
        gradients = drawn(i)
        new, state = step(gradients, state, i, KEY)
        applied += new["head"]["kernel"][0]
        given += gradients["head"]["kernel"].mean(0)
    rest = state.error["head/kernel"].mean(0)
    parts = state.part_error["head/kernel"].reshape(-1)[: 40 * 30].reshape(40, 30)
    np.testing.assert_allclose(applied + rest + parts, given, atol=1e-4)


@pytest.mark.parametrize(("bits", "per_number"), [(8, 1.0), (4, 0.5)])
def test_bytes_of_the_compiled_exchange_are_those_counted_by_hand(
    params, drawn, copies, on_devices, bits, per_number
):
    exchange = quantized(bits=bits, devices=8)
    state = copies(exchange.init(params))
    program = on_devices(exchange, drawn(0), state, 0, KEY)
    found = sum_up(read_collectives(program))
    # 288 = 8 * 36 and 1200 = 8 * 150 numbers, sent once to their device and once to
    # all; and from each device a scale for both rounds of both tensors.
    numbers = per_number * (288 + 1200)
    assert found["all-to-all"].bytes == numbers
    assert found["all-gather"].bytes == numbers + 8 * 4 * 4
    assert found["all-reduce"].bytes == 4 * 8 + 4


def test_devices_and_workers_agree(params, drawn, copies, workers, on_devices):
    exchange = quantized(bits=4, devices=8)
    state = copies(exchange.init(params))
    one = on_devices(exchange, drawn(0), state, 0, KEY)(drawn(0), state, 0, KEY)
    two = workers(exchange)(drawn(0), state, 0, KEY)
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(two[0]), strict=True):
        np.testing.assert_allclose(a, b[0], atol=1e-6)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(two[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_parts_are_even_and_cover_the_tensor():
    assert part_size(9, 8) == 2 and part_size(24, 8) == 4 and part_size(16, 8) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1, "devices": 8}, "bits must be from 2 to 8, got 1"),
        ({"bits": 9, "devices": 8}, "bits must be from 2 to 8, got 9"),
        ({"devices": 0}, "devices must be >= 1, got 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        quantized(**options)


def test_another_number_of_devices_is_refused(params, drawn, copies, workers):
    exchange = quantized(devices=4)
    state = copies(exchange.init(params))
    with pytest.raises(ValueError, match="devices is 4, but 8 exchange"):
        workers(exchange)(drawn(0), state, 0, KEY)
    with pytest.raises(ValueError, match="two axes or more"):
        exchange.init({"bias": jnp.zeros(3)})
