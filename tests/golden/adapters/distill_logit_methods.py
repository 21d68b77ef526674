"""Adapters of the vectors of methods that compare logits in other ways than KD."""

import jax.numpy as jnp

from jaxkd import distill, losses, metrics
from jaxkd.layers import Outputs


def distill_dkd(v):
    alpha, beta = v.hp("alpha"), v.hp("beta")
    method = distill.create(
        "dkd",
        alpha=alpha,
        beta=beta,
        temperature=v.hp("temperature"),
        warmup_epochs=0,
    )
    return v.differentiate(lambda x: _apply(v, method, x, x["in_labels"]))


def distill_nkd(v):
    gamma = v.hp("gamma")
    method = distill.create("nkd", gamma=gamma, temperature=v.hp("temp"))

    def loss(x):
        total, means = _apply(v, method, x, x["in_labels"])
        return total, {
            "target": means["target"],
            "nontarget_weighted": gamma * means["nontarget"],
        }

    return v.differentiate(loss)


def distill_nkd_softlabel(v):
    method = distill.create("nkd", gamma=v.hp("gamma"), temperature=v.hp("temp"))

    def loss(x):
        target = x["in_soft_labels"]
        batch = {"label": jnp.argmax(target, axis=-1), "target": target}
        return _apply_to(v, method, x, batch)[0]

    return v.differentiate(loss)


def distill_dist(v):
    tau = v.hp("tau")
    method = distill.create(
        "dist", beta=v.hp("beta"), gamma=v.hp("gamma"), temperature=tau, factor=1.0
    )

    def loss(x):
        total, means = _apply_to(v, method, x, {})
        return total, {name: mean / tau**2 for name, mean in means.items()}

    return v.differentiate(loss)


def distill_dist_seg(v):
    method = distill.create("dist", beta=v.hp("beta"), gamma=v.hp("gamma"), factor=1.0)
    return v.differentiate(lambda x: _apply_to(v, method, x, {})[0])


def distill_logit_std(v):
    method = distill.create(
        "logit_standardization",
        temperature=v.hp("temperature"),
        factor=v.hp("kd_weight"),
        eps=v.hp("eps"),
    )

    def loss(x):
        total, means = _apply_to(v, method, x, {})
        return total, {"kd": means["logit_standardization"]}

    return v.differentiate(loss)


def distill_mlld(v):
    weights = {"ce": v.hp("ce_weight")} | dict.fromkeys(
        ("kd", "cc", "bc"), v.hp("kd_weight")
    )
    method = distill.create(
        "mlld",
        temperatures=(v.hp("temperature"), 3.0, 5.0, 2.0, 6.0),
        ce_weight=v.hp("ce_weight"),
        kd_weight=v.hp("kd_weight"),
    )

    def loss(x):
        def network(side):
            strong = Outputs(logits=x[f"in_logits_{side}_strong"], taps={})
            return Outputs(
                logits=x[f"in_logits_{side}_weak"], taps={}, views={"strong": strong}
            )

        total, means = v.apply(
            method,
            student=network("s"),
            teachers=(network("t"),),
            batch={"label": x["in_labels"]},
        )
        return total, {name: weights[name] * mean for name, mean in means.items()}

    return v.differentiate(loss)


def distill_wsld(v):
    method = distill.create("wsld", temperature=v.hp("temp"), alpha=v.hp("alpha"))
    return v.differentiate(lambda x: _apply(v, method, x, x["in_labels"])[0])


def distill_deit_soft(v):
    method = distill.create(
        "deit", distillation="soft", alpha=v.hp("alpha"), temperature=v.hp("tau")
    )
    return v.differentiate(lambda x: _apply_tokens(v, method, x))


def distill_deit_hard(v):
    method = distill.create(
        "deit", distillation="hard", alpha=v.hp("alpha"), temperature=v.hp("tau")
    )
    return v.differentiate(lambda x: _apply_tokens(v, method, x))


def distill_function_matching(v):
    method = distill.create("function_matching", temperature=v.hp("t"))
    teachers = v.keys(r"in_logits_t\d+")
    assert len(teachers) == v.hp("teachers")

    def loss(x):
        return v.apply(
            method,
            student=Outputs(logits=x["in_logits_s"], taps={}),
            teachers=tuple(Outputs(logits=x[key], taps={}) for key in teachers),
        )[0]

    pair = v.numpy("in_logits_s"), v.numpy(teachers[0])
    return {
        **v.differentiate(loss),
        "out_euclidean": metrics.euclidean_distance(*pair),
        "out_l2": metrics.squared_distance(*pair),
        "out_hard": metrics.hard_divergence(*pair),
        "out_logsoftmax_euclidean": metrics.log_probability_distance(*pair),
        "out_agree": metrics.top_k_agreement(*pair),
        "out_agree_top5": metrics.top_k_agreement(*pair, k=5),
    }


def distill_camkd(v):
    temperature = v.hp("temperature")
    # The vectors hold maps that are projected already; the factors are the method's.
    method = distill.create("camkd", alpha=v.hp("a"), beta=v.hp("b"))
    factors = v.hp("r"), method.weights["kd"], method.weights["hint"]
    keys = {name: v.keys(rf"in_{name}\d+") for name in ("logits_t", "proj_s", "feat_t")}
    assert {len(found) for found in keys.values()} == {v.hp("teachers")}

    def loss(x):
        student, labels = x["in_logits_s"], x["in_labels"]
        teachers, projected, maps = ([x[key] for key in keys[n]] for n in keys)
        weights = losses.confidence_weights(teachers, labels)
        ce = jnp.mean(losses.cross_entropy(student, labels))
        div = jnp.mean(losses.camkd(student, teachers, labels, temperature=temperature))
        hint = jnp.mean(losses.weighted_hint(projected, maps, weights))
        average = distill.create("averaged_teachers", temperature=temperature)
        average_kd, _ = v.apply(
            average,
            student=Outputs(logits=student, taps={}),
            teachers=tuple(Outputs(logits=z, taps={}) for z in teachers),
        )
        parts = {"ce": ce, "div": div, "hint": hint}
        total = sum(f * part for f, part in zip(factors, parts.values(), strict=True))
        return total, {**parts, "weights": weights, "average_kd": average_kd}

    return v.differentiate(loss)


def _apply(v, method, x, labels):
    return _apply_to(v, method, x, {"label": labels})


def _apply_to(v, method, x, batch):
    return v.apply(
        method,
        student=Outputs(logits=x["in_logits_s"], taps={}),
        teachers=(Outputs(logits=x["in_logits_t"], taps={}),),
        batch=batch,
    )


def _apply_tokens(v, method, x):
    heads = {"cls_logits": x["in_logits_cls"], "dist_logits": x["in_logits_dist"]}
    return v.apply(
        method,
        student=Outputs(logits=sum(heads.values()) / 2, taps=heads),
        teachers=(Outputs(logits=x["in_logits_t"], taps={}),),
        batch={"label": x["in_labels"]},
    )[0]
