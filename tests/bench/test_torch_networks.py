"""The PyTorch networks of the benchmark have the sizes of jaxkd's."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxkd import models

NAMES = ("resnet8", "resnet110", "resnet8x4", "resnet32x4")
LARGE = ("resnet18", "resnet34", "resnet50")
CODE = """
import json, torch, torch_networks as networks
found = {}
for name in networks.names():
    network = networks.create(name, num_classes=7).eval()
    logits = network(torch.zeros(2, 3, 40, 40))
    found[name] = [networks.count_parameters(network), list(logits.shape)]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_every_network_has_as_many_parameters_as_in_jaxkd(script):
    pytest.importorskip("torch")
    path = [p for p in sys.path if p.endswith("bench")][-1]
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    found = json.loads(done.stdout)
    assert set(found) > {*NAMES, *LARGE}
    for name, (count, shape) in found.items():
        assert shape == [2, 7]
        assert count == jaxkd_parameters(name, 7), name


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)],
)
def test_jaxkd_has_the_published_sizes(name, count):
    assert jaxkd_parameters(name, 1000) == count


def jaxkd_parameters(name, classes):
    network = models.create(name, num_classes=classes)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
