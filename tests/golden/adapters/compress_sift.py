"""Sparse iso-FLOP layers: sizes, operations, residual blocks of every family."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import compression, models
from jaxkd.layers import BasicBlock
from jaxkd.sparsity import iso_flop
from jaxkd.sparsity.distributions import densities
from jaxkd.sparsity.sift_layers import folded
from jaxkd.sparsity.sift_network import Recipe, transform
from jaxkd.sparsity.structure import network_structure


def compress_sift_dims(v):
    def factorized(f_in, f_out, s, second_dense=False):
        return iso_flop.factorized_rank(
            int(f_in), int(f_out), sparsity=s, second_dense=second_dense
        )

    return {
        "wide_rows": [
            (
                s,
                iso_flop.branches(s),
                iso_flop.widening(s),
                iso_flop.wide_features(64, sparsity=s),
            )
            for s in v.numpy("wide_rows")[:, 0]
        ],
        "factorized_rows": [
            (i, o, s, factorized(i, o, s), factorized(i, o, s, second_dense=True))
            for i, o, s in v.numpy("factorized_rows")[:, :3]
        ],
        "doped_rows": [
            (i, o, s, iso_flop.doped_rank(int(i), int(o), sparsity=s))
            for i, o, s in v.numpy("doped_rows")[:, :3]
        ],
    }


def compress_sift_flops(v):
    network = models.create("resnet18", num_classes=100, stem="cifar")
    dense = network_structure(network, (32, 32, 3))
    flops = dense.flops()
    imagenet = models.create("resnet18", num_classes=1000)
    imagenet_flops = network_structure(imagenet, (224, 224, 3)).flops(average_pool=True)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    rows = {
        key: []
        for key in (
            "width_or_branches",
            "unmasked_flops",
            "unmasked_params",
            "flops_at_s",
            "searched_sparsity",
            "flops_after_search",
        )
    }
    for family, sparsity in zip(
        v.numpy("family").tolist(), v.numpy("sparsity").tolist(), strict=True
    ):

        def make(family=family, sparsity=sparsity, **options):
            recipe = Recipe(family=family, sparsity=sparsity, any_cost=True, **options)
            return transform(network, images, recipe=recipe, train=False)

        made = make()
        # The released rule masks U and V of the doped family as well.
        released = make(mask_low_rank=True) if family == "doped" else made
        at_s = densities(released.sparse, sparsity)
        size = {
            "wide": iso_flop.wide_features(64, sparsity=sparsity),
            "parallel": iso_flop.branches(sparsity),
        }
        rows["width_or_branches"].append(size.get(family, 0))
        rows["unmasked_flops"].append(made.unmasked_flops.total)
        rows["unmasked_params"].append(made.params)
        rows["flops_at_s"].append(released.structure.flops(at_s).total)
        rows["searched_sparsity"].append(made.sparsity)
        rows["flops_after_search"].append(made.flops.total)
    for key in rows:
        v.tolerances[key] = (0.0, 1e-9)
    return {
        **rows,
        "dense_flops": flops.total,
        "budget": flops.total,
        "dense_multiplies": flops.multiplies,
        "dense_adds": flops.adds,
        "dense_params": sum(int(np.prod(x)) for x in dense.params.values()),
        "imagenet_dense_flops": imagenet_flops.total,
    }


# Names of the files, and ours; branches and their norms lie side by side.
_LAYERS = (
    (r"(conv\d)(_list\.\d+)?\.weight", r"\1/kernel"),
    (r"(conv\d)\.sparse_conv\.weight", r"\1/kernel"),
    (r"(conv\d)\.U_conv3x3\.weight", r"\1/U/kernel"),
    (r"(conv\d)\.V_conv1x1\.weight", r"\1/V/kernel"),
    (r"(shortcut|downsample)\.0\.weight", "shortcut/conv/kernel"),
)
_NORMS = (
    (r"bn(\d)(_list\.\d+)?", r"norm\1"),
    (r"(conv\d)\.U_conv3x3_bn", r"\1/norm"),
    (r"(shortcut|downsample)\.1", "shortcut/norm"),
)
_FIELDS = {
    r"\.weight": "/scale",
    r"\.bias": "/bias",
    r"\.running_mean": "/mean",
    r"\.running_var": "/var",
}


def _ours(name):
    """The path of a parameter or statistic of the file; None if nobody uses it."""
    if "psum" in name:
        return None
    for theirs, path in _LAYERS:
        if re.fullmatch(theirs, name):
            return re.sub(theirs, path, name)
    for theirs, path in _NORMS:
        for field, own in _FIELDS.items():
            if re.fullmatch(theirs + field, name):
                return re.sub(theirs + field, path + own, name)
    raise KeyError(name)


def _gather(v, prefix):
    """The arrays under a prefix by our path, side by side where there are several."""
    parts = {}
    for key in v.keys(rf"{prefix}/.*"):
        path = _ours(key.removeprefix(f"{prefix}/"))
        value = v[key]
        if path is not None:
            parts.setdefault(path, []).append(value)
    return {path: jnp.concatenate(x, axis=-1) for path, x in parts.items()}


def _scatter(v, prefix, values):
    """The reverse of `_gather`: values by the file's keys."""
    found, done = {}, {}
    for key in v.keys(rf"{prefix}/.*"):
        path = _ours(key.removeprefix(f"{prefix}/"))
        if path is not None:
            start = done.get(path, 0)
            done[path] = start + v.arrays[key].shape[-1]
            found[key] = values[path][..., start : done[path]]
    return found


def _tree(arrays):
    tree = {}
    for path, value in arrays.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def _block(v, family, **options):
    params, stats = _gather(v, "p"), _gather(v, "s")
    masks = {path: mask.astype(bool) for path, mask in _gather(v, "mask").items()}
    x, dy = v["x"], v["dy"]
    if family in ("factorized", "doped"):
        options["ranks"] = {
            path.split("/")[0]: int(p.shape[-1])
            for path, p in params.items()
            if path.endswith("U/kernel")
        }
    made = compression.create(
        "sparse_ift",
        family=family,
        sparsity=float(v.numpy("sparsity")),
        updates="static",
        # A block alone has no stem; its first convolution is sparse as well.
        scope={"sparse": ["conv1", "conv2"]},
        **options,
    )
    stride = 2 if v.numpy("downsample") else 1
    block = BasicBlock(dy.shape[-1], stride=stride)
    with made.layers(False):
        variables = block.init(jax.random.key(0), x, False)
    drawn = compression.flatten(variables["params"])
    assert {p: a.shape for p, a in drawn.items()} == {
        p: a.shape for p, a in params.items()
    }
    _, state = made.init(jax.random.key(1), params)
    assert state["masks"].keys() <= masks.keys()
    state = {**state, "masks": masks}

    def run(params, x, train):
        cut = made.effective({}, state, params)
        with made.layers(train):
            return block.apply(
                {"params": _tree(cut), "batch_stats": _tree(stats)},
                x,
                train,
                mutable=["batch_stats"],
            )

    y_eval, _ = run(params, x, False)
    y_train, back, new = jax.vjp(lambda p, x: run(p, x, True), params, x, has_aux=True)
    gradients, dx = back(dy)
    after = compression.flatten(new["batch_stats"])
    cut = compression.apply_masks(gradients, masks)
    results = {
        "y_eval": y_eval,
        "y_train": y_train,
        "dx": dx,
        **_scatter(v, "s_after", after),
        **_scatter(v, "g", cut),
        **_scatter(v, "gdense", gradients),
    }
    for key in v.keys("s_after/.*psum.*"):  # built by the authors, used by nobody
        results[key] = v[key.replace("s_after", "s")]
    for key in v.keys("wnorm/.*"):
        path = key.removeprefix("wnorm/")
        kernel = folded(params[f"{path}/U/kernel"], params[f"{path}/V/kernel"])
        results[key] = jnp.sum(jnp.square(kernel))
    for key in results:
        size = float(np.abs(v.arrays[key]).max())
        gradient = key.startswith(("g/", "gdense/", "dx"))
        v.tolerances[key] = (1e-3, 1e-4 * size) if gradient else (1e-4, 1e-5)
    return results


def compress_sift_block_dense(v):
    return _block(v, "dense")


def compress_sift_block_parallel(v):
    return _block(v, "parallel")


def compress_sift_block_parallel_imagenet(v):
    return _block(v, "parallel", branch_relu=True)


def compress_sift_block_factorized_relu(v):
    return _block(v, "factorized", uv_layer="nonlinear_relu")


def compress_sift_block_factorized_linear(v):
    return _block(v, "factorized", uv_layer="linear")


def compress_sift_block_doped(v):
    return _block(v, "doped", mask_low_rank=True)
