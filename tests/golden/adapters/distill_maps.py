"""Adapters of the vectors of methods that compare feature maps without adapters,
or whose connectors are only a 1x1 convolution."""

import jax.numpy as jnp

from jaxkd import distill, losses
from jaxkd.layers import Outputs


def distill_at(v):
    method = distill.create("at", exponent=v.hp("p"), factor=v.hp("feat_weight"))
    return _run(v, method, lambda x, mean: {"unweighted": mean})


def distill_nst(v):
    method = distill.create("nst", factor=v.hp("feat_weight"))
    return _run(v, method, lambda x, mean: {"unweighted": mean})


def distill_fsp(v):
    def parts(x, mean):
        stages = _stages(v)
        values = [
            losses.fsp((x[f"in_s{i}"], x[f"in_s{j}"]), (x[f"in_t{i}"], x[f"in_t{j}"]))
            for i, j in zip(stages, stages[1:], strict=False)
        ]
        return {"parts": jnp.stack([jnp.mean(value) for value in values])}

    return _run(v, distill.create("fsp", factor=v.hp("feat_weight")), parts)


def distill_ab(v):
    margin = v.hp("margin")
    # The vectors begin behind the connectors.
    method = distill.create("ab", margin=margin, connector="where_needed")

    def parts(x, mean):
        stages = _stages(v)
        values = [
            2.0 ** (i - stages[-1])
            * losses.ab(x[f"in_s{i}"], x[f"in_t{i}"], margin=margin)
            for i in stages
        ]
        means = jnp.stack([jnp.mean(value) for value in values])
        return {"parts": method.weights["ab"] * means}

    return _run(v, method, parts)


def distill_ofd(v):
    def state(x):
        def replace(params, memory):
            for i in _stages(v):
                name, norm = f"connector{i + 1}", f"w_bn{i}_"
                params[name] = {
                    "conv": {"kernel": x[f"w_conv{i}_kernel"]},
                    "norm": {"scale": x[f"{norm}scale"], "bias": x[f"{norm}bias"]},
                }
                statistics = {"mean": x[f"{norm}mean"], "var": x[f"{norm}var"]}
                memory[name] = {"batch_stats": {"norm": statistics}}
            return params, memory

        return replace

    def norm(x, i):
        return {side: x[f"w_teacher_bn{i}_{side}"] for side in ("scale", "bias")}

    method = distill.create("ofd", factor=v.hp("feat_weight"))
    results = _run(
        v, method, lambda x, mean: {"unweighted": mean}, state=state, norm=norm
    )
    margins = {
        f"w_margin{i}": losses.ofd_margin(
            v[f"w_teacher_bn{i}_scale"], v[f"w_teacher_bn{i}_bias"]
        )
        for i in _stages(v)
    }
    return results | margins


def distill_ft(v):
    factor, powers = v.hp("feat_weight"), {"p1": v.hp("p1"), "p2": v.hp("p2")}

    def loss(x):
        # The vectors begin behind translator and paraphraser.
        mean = jnp.mean(losses.ft(x["in_feat_s"], x["in_feat_t"], **powers))
        return factor * mean, {"unweighted": mean}

    return v.differentiate(loss)


def _stages(v):
    return list(range(v.hp("stages")))


def _run(v, method, parts, *, state=None, norm=None):
    """Runs a method on maps `s0, s1, ...` and `t0, t1, ...`."""

    def loss(x):
        def outputs(side):
            taps = {}
            for i in _stages(v):
                taps[f"stage{i + 1}"] = taps[f"stage{i + 1}_pre"] = x[f"in_{side}{i}"]
            norms = {f"stage{i + 1}_pre": norm(x, i) for i in _stages(v) if norm}
            return Outputs(logits=jnp.zeros((1, 2)), taps=taps, norms=norms)

        options = {"state": state(x)} if state else {}
        total, means = v.apply(
            method, student=outputs("s"), teachers=(outputs("t"),), **options
        )
        (mean,) = means.values()
        return total, parts(x, mean)

    return v.differentiate(loss)
