"""Vector-quantised kernels on disk: the same kernels, and the bytes they take."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.compression import create, flatten
from jaxkd.main import main
from jaxkd.sparsity import vq
from jaxkd.sparsity.vq_file import coded, load, pack, save, unpack
from jaxkd.training import Plan, Workdir, make_setup
from jaxkd.training.compressed import split
from jaxkd.training.config import load_config
from jaxkd.training.loop import load_variables

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"a/conv/kernel": (3, 3, 8, 10), "b/kernel": (50, 13)}


def learned(**changes):
    options = dict(size=4, dim=2, clusters=5, temperature=0.05) | changes
    params = {
        path: jax.random.normal(jax.random.key(i), shape)
        for i, (path, shape) in enumerate(SHAPES.items())
    }
    scope = dict(sparse=["a/conv"])
    method = create("lr2vq", **options, hard_from=0.0, scope=scope)
    found, state = method.init(jax.random.key(5), params)
    kernels = method.effective(found, state, params)
    return vq.Quantizer(**options), found, kernels


@pytest.mark.parametrize("changes", [{}, {"dim": 4}, {"clusters": 16}, {"size": 9}])
def test_the_file_gives_back_the_kernels_of_the_network(tmp_path, changes):
    quantizer, found, kernels = learned(**changes)
    path = tmp_path / "kernels.npz"
    size = save(path, coded(found, quantizer, SHAPES))
    back = load(path)
    assert set(back) == set(SHAPES)
    for name, one in back.items():
        # The same products; only the order of their sums may differ.
        np.testing.assert_allclose(one.kernel(), kernels[name], rtol=1e-6, atol=1e-6)
    # What was counted is what is there, but for the last byte of the codes.
    bits = sum(quantizer.bits(shape) for shape in SHAPES.values())
    assert 0 <= 8 * size - bits < 8 * len(SHAPES)
    # Names, shapes and headers of four arrays for each kernel.
    assert 0 < path.stat().st_size - size < 600 * 4 * len(SHAPES)


def test_codes_are_stored_exactly(tmp_path):
    quantizer, found, _ = learned()
    kernels = coded(found, quantizer, SHAPES)
    save(tmp_path / "kernels.npz", kernels)
    for name, one in load(tmp_path / "kernels.npz").items():
        np.testing.assert_array_equal(one.codes, kernels[name].codes)
        np.testing.assert_array_equal(one.codebook, kernels[name].codebook)
        assert one.codebook.dtype == np.float16 and one.shape == SHAPES[name]


@pytest.mark.parametrize("bits", [1, 3, 8, 11])
def test_codes_are_packed_without_gaps(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, 77).astype(np.int32)
    packed = pack(codes, bits)
    assert packed.nbytes == -(-77 * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, 77), codes)


def test_the_highest_bit_comes_first():
    np.testing.assert_array_equal(pack(np.array([5, 1, 0]), 3), [0b10100100, 0])


def test_what_is_not_quantised_is_not_stored(tmp_path):
    quantizer, found, _ = learned(clusters=None)
    with pytest.raises(ValueError, match="has no codebook; train it with clusters"):
        coded(found, quantizer, SHAPES)
    np.savez(tmp_path / "other.npz", x=jnp.ones(2))
    with pytest.raises(ValueError, match="holds no vector-quantised kernels"):
        load(tmp_path / "other.npz")


@pytest.mark.slow
def test_the_smoke_config_runs_and_its_kernels_are_stored(tmp_path):
    config = ROOT / "configs" / "vq.py"
    workdir = tmp_path / "run"
    overrides = [
        f"--config.networks.{name}.width_factor=0.5"
        for name in ("float", "low_rank", "student")
    ]
    arguments = [f"--config={config}:smoke", f"--workdir={workdir}", *overrides]
    assert main([*arguments, "--config.data.batch_size=128"]) == 0
    summary = json.loads((workdir / "summary.json").read_text())
    names = ["float", "low_rank", "student"]
    assert list(summary["results"]) == names

    settings = load_config(f"{config}:smoke")
    for name in names:
        settings["networks"][name]["width_factor"] = 0.5
    settings["data"]["batch_size"] = 128
    setup = make_setup(Plan.from_config(settings))
    variables = load_variables(setup, Workdir(workdir), "student", names)
    own, found, _ = split(variables)
    kernels = flatten(own["params"])
    found = {path.removeprefix("lr2vq/"): x for path, x in found.items()}
    quantizer = vq.Quantizer(size=9, dim=4, clusters=16)
    shapes = {path: kernels[path].shape for path in vq.by_kernel(found)}
    save(tmp_path / "kernels.npz", coded(found, quantizer, shapes))
    for name, one in load(tmp_path / "kernels.npz").items():
        np.testing.assert_allclose(one.kernel(), kernels[name], rtol=1e-6, atol=1e-6)
