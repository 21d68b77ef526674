"""Adapters of the vectors of gradient compression."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.exchange import dgc, lgreco, lowrank, topk, warmup

# The momentum of the DGC file, and the last ratio and epochs of its warm-up, which its
# notes alone tell.
MOMENTUM = 0.9
WARMUP = (0.001, 5)


def dgc_worker(v, gradients, nesterov, masking):
    """What one worker sends, gets and remembers at each step, by the file's keys."""
    ratio = float(v.numpy("ratio"))
    exchange = dgc(
        ratio=ratio, momentum=MOMENTUM, nesterov=nesterov, momentum_masking=masking
    )
    state = exchange.init({"kernel": jnp.zeros((len(gradients[0]), 1))})
    prefix = f"nest{int(nesterov)}_mask{int(masking)}"
    results = {}
    for i, gradient in enumerate(gradients):
        _, unsent = topk.correct(
            gradient[:, None],
            state.momentum["kernel"],
            state.unsent["kernel"],
            momentum=MOMENTUM,
            nesterov=nesterov,
        )
        places, sent = topk.largest(unsent, ratio=ratio)
        new, state = jax.vmap(
            lambda g, s: exchange.update(
                {"kernel": g}, s, step=0, key=jax.random.key(0)
            ),
            axis_name="data",
        )(gradient[None, :, None], jax.tree.map(lambda x: x[None], state))
        state = jax.tree.map(lambda x: x[0], state)
        results |= {
            f"{prefix}_s{i}_idx": places,
            f"{prefix}_s{i}_val": sent,
            f"{prefix}_s{i}_out": new["kernel"].reshape(-1),
            f"{prefix}_s{i}_mom": state.momentum["kernel"].reshape(-1),
            f"{prefix}_s{i}_vel": state.unsent["kernel"].reshape(-1),
        }
    return results


def compress_dgc(v):
    gradients = [v[key] for key in v.keys(r"grad\d+")]
    results = {}
    for key in v.keys(r"nest\d_mask\d_s0_out"):
        nesterov, masking = (bool(int(n)) for n in re.findall(r"[a-z](\d)_", key)[:2])
        results |= dgc_worker(v, gradients, nesterov, masking)
    last, epochs = WARMUP
    ratios = warmup(last, epochs)
    ratios += [last] * (len(v.arrays["warmup_ratio"]) - len(ratios))
    v.tolerances["warmup_ratio"] = (1e-12, 0.0)
    return {**results, "warmup_ratio": ratios}


def compress_lgreco_dp(v):
    matrices = [v.numpy(key) for key in v.keys(r"tensor\d+")]
    low, high = int(v.numpy("min_rank")), int(v.numpy("max_rank"))
    ranks = list(range(low, high + 1))
    errors, sizes = lgreco.rank_tables(matrices, ranks)
    # The file's own errors are those of a decomposition in float32.
    v.tolerances["errors"] = (1e-4, 1e-6)
    given, given_sizes = v.numpy("errors"), v.numpy("sizes")
    base = ranks.index(int(v.numpy("base_rank")))
    results = {"errors": errors, "sizes": sizes}
    for key in v.keys(r"a[\d.]+_ranks"):
        prefix = key.removesuffix("_ranks")
        alpha = float(prefix.removeprefix("a"))
        budget = alpha * given[:, base].sum()
        chosen = lgreco.choose(given, given_sizes, base=base, alpha=alpha)
        if chosen is None:
            chosen = [base] * len(matrices)
        results |= {
            f"{prefix}_target": budget,
            f"{prefix}_disc_errors": lgreco.discretise(given, budget),
            f"{prefix}_ranks": np.array([ranks[i] for i in chosen]),
            f"{prefix}_total_size": given_sizes[np.arange(len(chosen)), chosen].sum(),
        }
    return results


def compress_powersgd_step(v):
    total = v["grad"] + v["error_in"]
    # QR would turn the signs of columns, which the product does not show.
    right = lowrank.gram_schmidt(v["q_in"])
    left = total @ right
    product, factor = lowrank.low_rank_round(
        total, v["q_in"], orthonormal=lowrank.gram_schmidt
    )
    results = {
        "q_orth": right,
        "p": left,
        "p_orth": lowrank.gram_schmidt(left),
        "q_out": factor,
        "decompressed": product,
        "error_out": total - product,
    }
    v.tolerances |= dict.fromkeys(results, (1e-4, 1e-4))
    return results
