"""Adapters of the vectors of relational and contrastive losses: registered methods."""

import jax.numpy as jnp

from jaxkd import distill, losses
from jaxkd.layers import Outputs


def distill_sp(v):
    method = distill.create("sp", factor=v.hp("feat_weight"))

    def loss(x):
        total, terms = v.apply(
            method,
            student=_outputs("stage1", x["in_feat_s"]),
            teachers=(_outputs("stage1", x["in_feat_t"]),),
        )
        return total, {"unweighted": terms["sp"]}

    return v.differentiate(loss)


def distill_cc(v):
    """The stored vectors are the embeddings, so the method's heads are identity."""
    width = v.arrays["in_emb_s"].shape[-1]
    method = distill.create("cc", factor=v.hp("feat_weight"), dim=width)
    identity = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}

    def loss(x):
        total, terms = v.apply(
            method,
            student=_outputs("pooled", x["in_emb_s"]),
            teachers=(_outputs("pooled", x["in_emb_t"]),),
            state=lambda params, memory: (dict.fromkeys(params, identity), memory),
        )
        return total, {"unweighted": terms["cc"]}

    return v.differentiate(loss)


def distill_rkd(v):
    method = distill.create(
        "rkd",
        distance=v.hp("distance_weight"),
        angle=v.hp("angle_weight"),
        eps=v.hp("eps"),
    )

    def loss(x):
        return v.apply(
            method,
            student=_outputs("pooled", x["in_emb_s"]),
            teachers=(_outputs("pooled", x["in_emb_t"]),),
        )

    return v.differentiate(loss)


def distill_pkt(v):
    method = distill.create("pkt", factor=v.hp("feat_weight"), eps=v.hp("eps"))
    # The factor amplifies float32 rounding; the unweighted value is the sharper check.
    v.tolerances["out_unweighted"] = (v.tolerance("out_loss")[0], 2e-8)

    def loss(x):
        total, terms = v.apply(
            method,
            student=_outputs("pooled", x["in_emb_s"]),
            teachers=(_outputs("pooled", x["in_emb_t"]),),
        )
        return total, {"unweighted": terms["pkt"]}

    return v.differentiate(loss)


def distill_crd(v):
    """The loss with the file's draws; that the method uses it has a test of its own."""
    temperature, momentum = v.hp("temperature"), v.hp("momentum")
    assert v["in_contrast_index"].shape[1] == 1 + v.hp("K")
    assert len(v["w_memory_s_before"]) == v.hp("num_data")

    def embed(x, side):
        kernel, bias = x[f"w_embed_{side}_kernel"], x[f"w_embed_{side}_bias"]
        return x[f"in_emb_{side}"] @ kernel + bias[None, :]

    def loss(x):
        student, teacher = embed(x, "s"), embed(x, "t")
        banks = x["w_memory_s_before"], x["w_memory_t_before"]
        arrays = (student, teacher, *banks, x["in_contrast_index"])
        z_s, z_t = losses.crd_normalizers(*arrays, temperature=temperature)
        values = losses.crd(*arrays, normalizers=(z_s, z_t), temperature=temperature)
        new_s, new_t = (
            losses.update_bank(bank, new, x["in_index"], momentum=momentum)
            for bank, new in zip(banks, (student, teacher), strict=True)
        )
        parts = {"unweighted": jnp.mean(values), "Z_s": z_s, "Z_t": z_t}
        parts |= {"memory_s_after": new_s, "memory_t_after": new_t}
        return v.hp("feat_weight") * parts["unweighted"], parts

    return v.differentiate(loss)


def _outputs(tap, value):
    return Outputs(logits=jnp.zeros((len(value), 2)), taps={tap: value})
