"""Adapters of the selection of batches and records."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkd import select


def compress_hard_minibatch(v):
    x, y = v["x"], v["y"]
    batches, size = y.shape
    steps = int(v["epochs"]) * batches
    data = select.SelectionData(
        records=batches * size,
        batch_size=size,
        steps_per_epoch=batches,
        epochs=int(v["epochs"]),
    )
    tx = optax.sgd(float(v["lr"]), float(v["momentum"]))
    images, labels = x.reshape(batches * size, -1), y.reshape(-1)

    def losses_of(w, numbers):
        logits = jnp.take(images, numbers, axis=0) @ w
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[numbers])

    def train(delta):
        selection = select.create("hard_batches", delta=delta)

        @jax.jit
        def step(carry, i):
            w, moments, state = carry
            numbers = selection.pick(state)
            loss, gradient = jax.value_and_grad(
                lambda w: jnp.mean(losses_of(w, numbers))
            )(w)
            state = selection.record(state, numbers, losses_of(w, numbers), i)
            updates, moments = tx.update(gradient, moments)
            carry = (optax.apply_updates(w, updates), moments, state)
            return carry, (numbers[0] // size, loss)

        w0 = jnp.asarray(v["w0"])
        start = (w0, tx.init(w0), selection.init(jax.random.key(0), data))
        (w, _, _), (visited, losses) = jax.lax.scan(step, start, jnp.arange(steps))
        return visited, losses, w

    hard, full = train(float(v["delta"])), train(1.0)
    keys = ("batch", "loss", "w")
    return {
        **{f"hard_{key}": value for key, value in zip(keys, hard, strict=True)},
        **{f"full_{key}": value for key, value in zip(keys, full, strict=True)},
    }


def compress_sample_selection(v):
    with jax.enable_x64(True):
        logits, labels = jnp.asarray(v.numpy("logits")), jnp.asarray(v.numpy("labels"))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        count = int(float(v["ohem_fraction"]) * len(losses))
        chosen = select.hardest(losses, count)
        history = jnp.asarray(v.numpy("loss_history"))
        chance = select.history_probability(losses, history, float(v["sb_beta"]))
        scores = select.el2n(logits, labels)
        kept = int(float(v["prune_keep_fraction"]) * len(losses))
        ranked = select.loss_rank_probability(losses, float(v["lossrank_pressure"]))
        ohem = select.ohem(keep=float(v["ohem_fraction"]))
        weights = ohem.weigh({}, losses, jax.random.key(0))
        results = {
            "ce": losses,
            "ohem_idx": chosen,
            "ohem_loss": jnp.mean(weights * losses),
            "sb_prob": chance,
            "sb_selected": jnp.asarray(v.numpy("u")) < chance,
            "lossrank_prob": ranked,
            "el2n": scores,
            "el2n_keep_idx": select.hardest(scores, kept),
        }
        return {key: np.asarray(value) for key, value in results.items()}
