"""What the devices can do at best: the measured speed of one large matrix product."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

# Large enough to fill the device, small enough to be over in a fraction of a second.
_SIZES = {"cpu": 1024}
_LARGE = 8192
_ROUNDS = 5


@functools.cache
def matmul_ceiling(dtype: str = "float32") -> float:
    """FLOP/s of a square matrix product on one device, the best of five rounds.

    The ceiling is measured once in a process, in the state in which the machine is;
    other work on it lowers the ceiling. Products of 1024 rows on a CPU and of 8192
    elsewhere; those of bfloat16 accumulate in float32.

    Args:
      dtype: of the factors.
    """
    size = _SIZES.get(jax.default_backend(), _LARGE)
    device = jax.local_devices()[0]
    key = jax.random.key(0)
    with jax.default_device(device):
        x = jax.random.normal(key, (size, size), jnp.dtype(dtype))
        multiply = jax.jit(jnp.dot)
        multiply(x, x).block_until_ready()
        # Several products in a row hide the time to start one.
        repeats = 8 if device.platform != "cpu" else 2
        best = float("inf")
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            y = x
            for _ in range(repeats):
                y = multiply(x, y)
            y.block_until_ready()
            best = min(best, (time.perf_counter() - start) / repeats)
    return 2 * size**3 / best
