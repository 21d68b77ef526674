"""Adapters of the vectors of BottleFit: the module, its quantiser and its loss."""

import jax
import jax.numpy as jnp

from jaxkd import distill
from jaxkd.layers import BottleneckCodec, Outputs
from jaxkd.numerics import affine_dequantize, affine_quantize

# Where the published list of layers is cut between encoder and decoder.
VERSIONS = {4: 1, 7: 2, 10: 3}


def _variables(x, keys, version):
    """The layers of encoder and decoder in their order, renamed."""
    variables = {"params": {}, "batch_stats": {}}
    for part, prefix in (("encoder", "enc"), ("decoder", "dec")):
        convs, norms = [], []
        for key in keys:
            layer, _, what = key.removeprefix("w_").partition("_")
            if layer.startswith(prefix) and what == "kernel":
                convs.append({"kernel": x[key]})
            elif layer.startswith(prefix) and what == "scale":
                norms.append(f"w_{layer}")
        if version == 3 and part == "decoder":
            # Flax does not turn the kernel of a transposed convolution around.
            convs[0] = {"kernel": convs[0]["kernel"][::-1, ::-1]}
        named = {f"norm{i}": name for i, name in enumerate(norms, start=1)}
        variables["params"][part] = {
            **{f"conv{i}": conv for i, conv in enumerate(convs, start=1)},
            **{
                k: {n: x[f"{v}_{n}"] for n in ("scale", "bias")}
                for k, v in named.items()
            },
        }
        variables["batch_stats"][part] = {
            k: {n: x[f"{v}_{n}"] for n in ("mean", "var")} for k, v in named.items()
        }
    return variables


def distill_bottlefit_module(v):
    version = VERSIONS[v.hp("bottleneck_idx")]
    keys = v.keys(r"w_(enc|dec)\d+_\w+")
    encoder = [v[key].shape[-1] for key in v.keys(r"w_enc\d+_kernel")]
    decoder = [v[key].shape[-1] for key in v.keys(r"w_dec\d+_kernel")]
    codec = BottleneckCodec(
        channels=v.hp("bottleneck_channel"),
        stem_width=decoder[0] if version == 1 else encoder[0],
        stage_width=decoder[-1],
        version=version,
    )

    def loss(x):
        variables = _variables(x, keys, version)
        code, output = codec.apply(variables, x["in_image"], False)
        return jnp.sum(output**2), {"bottleneck": code, "output": output}

    return v.differentiate(loss)


def distill_bottleneck_quant(v):
    z, bits = v["in_z"], v.hp("num_bits")
    quantize = jax.jit(affine_quantize, static_argnames=("bits", "per_sample"))
    quantized = quantize(z, bits=bits, per_sample=False)
    restored = affine_dequantize(quantized)
    return {
        "out_loss": jnp.mean(jnp.square(restored - z)),
        "out_quantized": quantized.values,
        "out_scale": quantized.scale,
        "out_zero_point": quantized.zero_point,
        "out_dequantized": restored,
    }


def distill_ghnd(v):
    taps = tuple(f"stage{i + 2}" for i in range(v.hp("stages")))
    method = distill.create("ghnd", student_taps=taps)
    students, teachers = v.keys(r"in_s\d+"), v.keys(r"in_t\d+")

    def loss(x):
        def outputs(keys):
            maps = [x[key] for key in keys]
            logits = jnp.zeros((maps[0].shape[0], 2))
            return Outputs(logits=logits, taps=dict(zip(taps, maps, strict=True)))

        return v.apply(
            method, student=outputs(students), teachers=(outputs(teachers),)
        )[0]

    return v.differentiate(loss)
