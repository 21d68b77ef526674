"""Adapters of the vectors of methods that train a connector between feature maps."""

import jax
import jax.numpy as jnp

from jaxkd import distill, losses
from jaxkd.distill.modules import apply_module
from jaxkd.layers import Outputs
from jaxkd.layers.connectors import (
    ConvNorm,
    HintRegressor,
    MaskedGenerator,
    Projector,
    Review,
)


def distill_fitnet(v):
    method = distill.create("fitnet", factor=v.hp("feat_weight"))
    assert v.numpy("in_feat_s").shape[1] == v.hp("stride") * _size(v, "in_feat_t")[0]
    module = HintRegressor(v.numpy("in_feat_t").shape[-1], _size(v, "in_feat_t"))

    def loss(x):
        params, memory = _modules(x, {"conv": "conv", "bn": "norm"})
        total, means = _between_maps(v, x, method, (params, memory), tap="stage2")
        regressed, _ = apply_module(module, params, memory, x["in_feat_s"], train=True)
        return total, {"mse": means["fitnet"], "regressed": regressed}

    return v.differentiate(loss)


def distill_vid(v):
    options = {
        "epsilon": v.hp("eps"),
        "initial_variance": v.hp("init_pred_var"),
        "factor": v.hp("feat_weight"),
    }
    method = distill.create("vid", **options)
    layers = [k.removeprefix("w_").split("_")[0] for k in v.keys(r"w_conv\d+_kernel")]

    def loss(x):
        params, memory = _modules(x, {layer: layer for layer in layers})
        params["log_scale"] = x["w_log_scale"]
        state = {"pair0": params}, {"pair0": memory}
        return _between_maps(v, x, method, state)[0]

    return v.differentiate(loss)


def distill_reviewkd(v):
    method = distill.create(
        "reviewkd", factor=1.0, warmup_epochs=0, mid_channels=v.hp("mid_channel")
    )
    students, teachers = v.keys(r"in_s\d+"), v.keys(r"in_t\d+")
    shapes = [v.arrays[key].shape for key in teachers]
    # Sizes are listed from the deepest map to the shallowest, channels the other way.
    assert [s[1] for s in shapes] == v.hp("shapes")[::-1]
    assert [s[-1] for s in shapes] == v.hp("out_channels")
    assert [v.arrays[key].shape[-1] for key in students] == v.hp("in_channels")
    module = Review(
        v.hp("mid_channel"), [s[-1] for s in shapes], [s[1:3] for s in shapes]
    )
    parts = {"conv1": "conv1", "bn1": "norm1", "conv2": "conv2", "bn2": "norm2"}
    parts["att"] = "attention"

    def outputs(x, keys):
        *maps, vector = (x[key] for key in keys)
        taps = {f"stage{i}": map_ for i, map_ in enumerate(maps, start=1)}
        taps["pooled"] = vector[:, 0, 0, :]
        return Outputs(logits=jnp.zeros((len(vector), 2)), taps=taps)

    def loss(x):
        blocks = {
            f"block{i}": _modules(x, parts, prefix=f"abf{i}_")
            for i in range(len(students))
        }
        params = {name: block for name, (block, _) in blocks.items()}
        statistics = {name: block["batch_stats"] for name, (_, block) in blocks.items()}
        memory = {"batch_stats": statistics}
        total, _ = v.apply(
            method,
            student=outputs(x, students),
            teachers=(outputs(x, teachers),),
            state=lambda *initial: _replaced(initial, (params, memory)),
        )
        fused, _ = apply_module(
            module, params, memory, *(x[key] for key in students), train=True
        )
        return total, {f"fused{i}": y for i, y in enumerate(fused)}

    return v.differentiate(loss)


def distill_mgd_masked(v):
    """The mask of the file takes the place of the one that the method draws."""
    channels = v.numpy("in_feat_t").shape[-1]
    unit = "channels" if v.numpy("in_mask").shape[-1] == channels else "pixels"
    method = distill.create(
        "mgd_masked",
        alpha=v.hp("alpha_mgd"),
        lambda_mgd=v.hp("lambda_mgd"),
        mask_unit=unit,
    )
    parts = {"align": "align", "gen0": "conv0", "gen1": "conv1"}

    def loss(x):
        params, _ = _modules(x, parts)
        student, teacher = x["in_feat_s"], x["in_feat_t"]
        generated, _ = apply_module(
            MaskedGenerator(channels), params, {}, student, x["in_mask"], train=True
        )
        value = jnp.mean(losses.reconstruction(generated, teacher))
        return method.weights["mgd_masked"] * value, {"unweighted": value}

    return v.differentiate(loss)


def distill_srrl(v):
    method = distill.create("srrl", beta=v.hp("weight"))
    module = ConvNorm(v.numpy("in_feat_t").shape[-1], relu=True)

    def loss(x):
        params, memory = _modules(x, {"conv": "conv", "bn": "norm"})
        total, means = _between_maps(v, x, method, (params, memory), head=_head(x))
        connected, _ = apply_module(module, params, memory, x["in_feat_s"], train=True)
        return total, {
            "feature": means["feature"],
            "softmax_regression": means["regression"],
            "logits_from_student_feature": _logits(connected, _head(x)),
        }

    return v.differentiate(loss)


def distill_simkd(v):
    factor = v.hp("factor")
    method = distill.create("simkd", factor=factor)
    parts = {f"conv{i}": f"conv{i}" for i in range(3)}
    parts |= {f"bn{i}": f"norm{i}" for i in range(3)}
    module = Projector(v.numpy("in_feat_t").shape[-1], factor, _size(v, "in_feat_t"))

    def loss(x):
        params, statistics = _modules(x, parts)
        total, _ = _between_maps(
            v,
            x,
            method,
            lambda _, memory: (params, {**memory, "projector": statistics}),
            head=_head(x),
        )
        projected, _ = apply_module(
            module, params, statistics, x["in_feat_s"], train=True
        )
        return total, {"logits": _logits(projected, _head(x))}

    return v.differentiate(loss)


def _between_maps(v, x, method, state, *, tap="stage1", head=None):
    """Runs a method on networks whose only map is that of the file."""
    student, teacher = x["in_feat_s"], x["in_feat_t"]
    vector = jnp.mean(teacher, axis=(1, 2))
    logits = jnp.zeros((len(teacher), 2)) if head is None else _logits(teacher, head)
    return v.apply(
        method,
        student=Outputs(logits=logits, taps={tap: student}),
        teachers=(
            Outputs(logits=logits, taps={tap: teacher, "pooled": vector}, head=head),
        ),
        state=state if callable(state) else lambda *initial: _replaced(initial, state),
    )


def _replaced(initial, state):
    """The stored state, which must have the structure of the method's own."""
    shapes = [
        {name: leaf.shape for name, leaf in _leaves(tree)} for tree in (initial, state)
    ]
    assert shapes[0] == shapes[1]
    return state


def _leaves(tree):
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in paths]


def _modules(x, names, *, prefix=""):
    """`(params, memory)` from the arrays `w_<prefix><name>_<array>` of the file."""
    params, statistics = {}, {}
    for name, module in names.items():
        arrays = {
            array: x[f"w_{prefix}{name}_{array}"]
            for array in ("kernel", "bias", "scale", "mean", "var")
            if f"w_{prefix}{name}_{array}" in x
        }
        moments = {k: arrays.pop(k) for k in ("mean", "var") if k in arrays}
        if arrays:
            params[module] = arrays
        if moments:
            statistics[module] = moments
    return params, {"batch_stats": statistics} if statistics else {}


def _head(x):
    return {"kernel": x["w_teacher_fc_kernel"], "bias": x["w_teacher_fc_bias"]}


def _logits(maps, head):
    return jnp.mean(maps, axis=(1, 2)) @ head["kernel"] + head["bias"][None]


def _size(v, key):
    return v.arrays[key].shape[1:3]
