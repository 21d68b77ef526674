"""Adapters of the vectors of losses between dense predictions and features."""

import jax
import jax.numpy as jnp

from jaxkd import distill
from jaxkd.layers import Outputs


def distill_seg_kd(v):
    method = distill.create("kd", temperature=v.hp("temperature"))
    return v.differentiate(lambda x: _logits(v, method, x)[0])


def distill_cwd(v):
    method = distill.create(
        "cwd", factor=v.hp("weight"), temperature=v.hp("temperature")
    )

    def loss(x):
        total, terms = _pair(v, method, x["in_map_s"], x["in_map_t"])
        return total, {"unweighted": terms["cwd"]}

    return v.differentiate(loss)


def distill_skd_pixel(v):
    method = distill.create("skd_pixel", factor=v.hp("weight"))

    def loss(x):
        total, terms = _logits(v, method, x)
        return total, {"unweighted": terms["skd_pixel"]}

    return v.differentiate(loss)


def distill_skd_pair(v):
    taps = {"student_tap": "feat", "teacher_tap": "feat"}
    method = distill.create("skd_pair", scale=v.hp("scale"), **taps)
    return v.differentiate(lambda x: _features(v, method, x)[0])


def distill_ifvd(v):
    taps = {"student_tap": "feat", "teacher_tap": "feat"}
    method = distill.create("ifvd", factor=v.hp("weight"), **taps)

    def loss(x):
        total, terms = _features(
            v, method, x, classes=v.hp("num_classes"), label=x["in_labels"]
        )
        return total, {"unweighted": terms["ifvd"]}

    return v.differentiate(loss)


def distill_cirkd_minibatch(v):
    """The method's other terms have weight zero: the file is without memory."""
    method = distill.create(
        "cirkd",
        temperature=v.hp("temperature"),
        beta=0.0,
        gamma=0.0,
        student_tap="feat",
        teacher_tap="feat",
        pixel_memory=1024,
        region_memory=64,
        pixel_contrast=8,
        region_contrast=8,
    )

    def loss(x):
        batch, height, width, _ = x["in_feat_s"].shape
        label = jnp.zeros((batch, height, width), jnp.int32)
        return _features(v, method, x, label=label)[0]

    return v.differentiate(loss)


def distill_mgd_ssss(v):
    """Both unlabelled views of a network predict its pseudo labels."""
    method = distill.create(
        "mgd_ssss",
        lambda_1=v.hp("lambda_1"),
        lambda_2=v.hp("lambda_2"),
        teacher_terms=True,
        student_tap="aspp",
        wide_tap="aspp",
    )

    def network(x, i):
        labelled, mixed, pseudo = x[f"in_s{i}"], x[f"in_u{i}"], x[f"in_pseudo_{i}"]
        alone = Outputs(logits=jax.nn.one_hot(pseudo, mixed.shape[-1]), taps={})
        taps = {"aspp": x[f"in_aspp_{i}"]} if i < 3 else {}
        views = {
            "unlabelled_a": alone,
            "unlabelled_b": alone,
            "mixed": Outputs(logits=mixed, taps=taps),
        }
        return Outputs(logits=labelled, taps=taps, views=views)

    def loss(x):
        mask = jnp.zeros((*x["in_pseudo_1"].shape, 1), jnp.float32)
        total, terms = v.apply(
            method,
            student=network(x, 1),
            teachers=(network(x, 2), network(x, 3)),
            batch={"label": x["in_labels"], "mixed_mask": mask},
        )
        return total, {
            "consist_unlabelled": terms["unlabelled"] + terms["teachers_unlabelled"],
            "consist_labelled": terms["labelled"] + terms["teachers_labelled"],
            "semantic": v.hp("lambda_1") * terms["semantic"],
            "content": v.hp("lambda_2") * terms["content"],
            "sup_1": terms["supervised"],
            "sup_2": terms["wide_supervised"],
            "sup_3": terms["deep_supervised"],
        }

    return v.differentiate(loss)


def _pair(v, method, student, teacher):
    return v.apply(
        method,
        student=Outputs(logits=student, taps={}),
        teachers=(Outputs(logits=teacher, taps={}),),
    )


def _logits(v, method, x):
    return _pair(v, method, x["in_logits_s"], x["in_logits_t"])


def _features(v, method, x, *, classes=2, **batch):
    student, teacher = x["in_feat_s"], x["in_feat_t"]

    def outputs(features):
        logits = jnp.zeros((*features.shape[:3], classes), jnp.float32)
        return Outputs(logits=logits, taps={"feat": features})

    return v.apply(
        method,
        student=outputs(student),
        teachers=(outputs(teacher),),
        batch=batch,
    )
