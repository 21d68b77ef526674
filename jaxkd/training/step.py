"""The one train step, and the evaluation step.

`augment -> teachers -> student -> terms -> weighted sum -> gradient -> update`: a pure
function of (state, batch, teachers' variables). Random numbers come from
`fold_in(state.key, state.step)`, so a resumed run draws what the unbroken run would
have drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from jaxkd.data.augment import Augmentation
from jaxkd.distill.method import (
    Inputs,
    Method,
    Progress,
    weight_at,
)
from jaxkd.layers import Outputs
from jaxkd.select import Selection
from jaxkd.training.compressed import mask_moments, masked_tree
from jaxkd.training.exchanged import PerDevice
from jaxkd.training.network import ApplyFn, Upkeep, Variables
from jaxkd.training.optimizers import Schedule
from jaxkd.training.paths import path_name
from jaxkd.training.selecting import (
    check_by_record,
    keeping,
    loss_of_records,
    weighted,
)
from jaxkd.training.start import SELECTION_STREAM, step_keys
from jaxkd.training.state import TrainState
from jaxkd.training.wrappers import READOUT, readout_variables

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
StepFn = Callable[
    [TrainState, Batch, tuple[Variables, ...]], tuple[TrainState, Metrics]
]


@runtime_checkable
class Augments(Protocol):
    """What prepares a training batch, such as `Augmentation`."""

    def train(
        self,
        batch: Mapping[str, jax.Array],
        *,
        key: jax.Array,
        epoch: int | jax.Array,
        num_classes: int,
    ) -> dict[str, jax.Array]:
        """Returns the batch as the networks read it."""
        ...


@runtime_checkable
class StoredOutputs(Protocol):
    """`stored(batch, constants)`: what teachers said of a batch, from its entries."""

    def __call__(
        self, batch: Mapping[str, jax.Array], constants: tuple[Variables, ...]
    ) -> tuple[Outputs, ...]:
        """Returns the outputs of each teacher."""
        ...


# Streams of random numbers drawn from one step's key.
_METHOD, _NETWORK, _TEACHER = 0, 1, 3
_UPKEEP, _PREPARE = 2**32 - 2, 2**32 - 1


def make_train_step(
    *,
    student: ApplyFn,
    teachers: Sequence[ApplyFn],
    method: Method,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    augmentation: Augments,
    num_classes: int,
    steps_per_epoch: int,
    epochs: int,
    accumulate: int = 1,
    ema: float | None = None,
    frozen: Callable[[str], bool] | None = None,
    stored: StoredOutputs | None = None,
    upkeep: Upkeep | None = None,
    selection: Selection | None = None,
    scorer: ApplyFn | None = None,
    exchange: PerDevice | None = None,
) -> StepFn:
    """Makes `step(state, batch, teacher_variables) -> (state, metrics)`.

    Args:
      student: the learner's apply function.
      teachers: the teachers' apply functions, run in evaluation mode behind a
        stop-gradient.
      method: the losses.
      tx: the optimiser.
      schedule: its learning rate, for the metrics.
      augmentation: applied to the batch first.
      num_classes: for soft targets of mixed images.
      steps_per_epoch: to tell the epoch from the step.
      epochs: of the stage.
      accumulate: micro-batches per step. Gradients are averaged; batch-norm and
        batch-coupled losses see one micro-batch at a time.
      ema: decay of the running average of the variables.
      frozen: tells by its path which of the network's parameters get no gradient.
      stored: gives the teachers' outputs instead of `teachers`, which are not run; it
        gets the step's third argument.
      upkeep: what the student wants done around every step (masks and the like).
      selection: which records of the batch are trained on.
      scorer: the network whose losses rank the records of a selection that keeps some
        of them; its variables come after the teachers'. By default the student.
      exchange: how devices exchange gradients of their own shares of the batch; batch
        norm and batch-coupled losses see one share then. `tx` keeps its state. By
        default the compiler sums the gradients of the global batch.

    Returns:
      The pure step. Its metrics are `loss`, `terms` (unweighted means, float32),
      `learning_rate`, `grad_norm` and `update_norm`; with `upkeep` or `selection` also
      `facts`, theirs after the step.
    """

    def stop_frozen(params: Any) -> Any:
        is_frozen = frozen
        if is_frozen is None:
            return params

        def stop(path: Sequence[Any], x: jax.Array) -> jax.Array:
            return jax.lax.stop_gradient(x) if is_frozen(path_name(path)) else x

        return jax.tree.map_with_path(stop, params)

    def loss_fn(
        params: dict[str, Any],
        collections: Variables,
        memory: Any,
        batch: Batch,
        teacher_outputs: tuple[Outputs, ...],
        key: jax.Array,
        step: jax.Array,
        selected: Any,
    ) -> tuple[jax.Array, Any]:
        outputs, collections = _all_views(
            student,
            {"params": stop_frozen(params["network"]), **collections},
            batch,
            method.views,
            train=True,
            key=jax.random.fold_in(key, _NETWORK),
        )
        inputs = Inputs(
            student=outputs,
            teachers=teacher_outputs,
            batch=batch,
            key=jax.random.fold_in(key, _METHOD),
            progress=Progress(step=step, epoch=step // steps_per_epoch, epochs=epochs),
        )
        terms, memory = method.terms(params["method"], memory, inputs)
        terms = {k: v.astype(jnp.float32) for k, v in terms.items()}
        weights = {k: weight_at(method.weights[k], step) for k in terms}
        losses, share = None, None
        if selection is not None:
            losses = loss_of_records(terms, weights, len(outputs.logits))
            if selection.weigh is not None:
                check_by_record(terms, len(outputs.logits))
                by_record = selection.weigh(
                    selected, losses, jax.random.fold_in(key, SELECTION_STREAM)
                )
                share = jnp.mean((by_record > 0).astype(jnp.float32))
                terms = {k: weighted(v, by_record) for k, v in terms.items()}
        means = {k: jnp.mean(v) for k, v in terms.items()}
        loss = sum(
            (weights[k] * v for k, v in means.items()),
            start=jnp.zeros((), jnp.float32),
        )
        if upkeep is not None:
            extra = upkeep.terms({"params": params["network"], **collections})
            for name, value in extra.items():
                loss = loss + upkeep.weights[name] * value
            means = {**means, **extra}
        return loss, (means, share, collections, memory, losses)

    def run_teachers(
        batch: Batch, teacher_variables: tuple[Variables, ...], key: jax.Array
    ) -> tuple[Outputs, ...]:
        training = method.teacher_mode == "train"
        teacher_key = jax.random.fold_in(key, _TEACHER) if training else None
        return tuple(
            jax.lax.stop_gradient(
                _all_views(
                    apply, variables, batch, method.views, train=training,
                    key=teacher_key,
                )[0]
            )
            for apply, variables in zip(teachers, teacher_variables, strict=True)
        )  # fmt: skip

    def micro_step(
        state: TrainState,
        collections: Variables,
        memory: Any,
        batch: Batch,
        teacher_variables: tuple[Variables, ...],
        key: jax.Array,
    ) -> Any:
        if stored is None:
            teacher_outputs = run_teachers(batch, teacher_variables, key)
        else:
            teacher_outputs = jax.lax.stop_gradient(stored(batch, teacher_variables))
        return jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, collections, memory, batch, teacher_outputs, key, state.step,
            state.selection,
        )  # fmt: skip

    def whole(
        state: TrainState,
        batch: Batch,
        teacher_variables: tuple[Variables, ...],
        key: jax.Array,
    ) -> Any:
        return micro_step(
            state, state.collections, state.memory, batch, teacher_variables, key
        )

    def accumulated(
        state: TrainState,
        batch: Batch,
        teacher_variables: tuple[Variables, ...],
        key: jax.Array,
    ) -> Any:
        # [batch] -> [accumulate, batch / accumulate]; taking every n-th record keeps
        # each device's records on that device.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def body(carry: Any, xs: tuple[jax.Array, Batch]) -> tuple[Any, Any]:
            sums, collections, memory = carry
            i, part = xs
            (loss, (means, share, collections, memory, losses)), grads = micro_step(
                state, collections, memory, part, teacher_variables,
                jax.random.fold_in(key, i),
            )  # fmt: skip
            sums = jax.tree.map(jnp.add, sums, (loss, means, share, grads))
            return (sums, collections, memory), losses

        first = jax.tree.map(lambda x: x[0], parts)
        (loss, (means, share, *_)), grads = jax.eval_shape(
            micro_step, state, state.collections, state.memory, first,
            teacher_variables, key,
        )  # fmt: skip
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (loss, means, share, grads)
        )
        (sums, collections, memory), losses = jax.lax.scan(
            body,
            (zeros, state.collections, state.memory),
            (jnp.arange(accumulate), parts),
        )
        loss, means, share, grads = jax.tree.map(lambda x: x / accumulate, sums)
        if losses is not None:
            losses = losses.swapaxes(0, 1).reshape(-1)  # in the order of the batch
        return (loss, (means, share, collections, memory, losses)), grads

    kept = keeping(selection, student, scorer)

    def step(
        state: TrainState, batch: Batch, teacher_variables: tuple[Variables, ...]
    ) -> tuple[TrainState, Metrics]:
        augment_key, step_key = step_keys(state.key)
        key = jax.random.fold_in(step_key, state.step)
        batch = augmentation.train(
            batch,
            key=augment_key,
            epoch=state.step // steps_per_epoch,
            num_classes=num_classes,
        )
        numbers = batch["index"]
        batch, teacher_variables = kept(batch, state, teacher_variables)
        if method.prepare is not None:
            # Apart from the keys of the micro-batches, which are counted from 0.
            batch = method.prepare(batch, jax.random.fold_in(key, _PREPARE))
        value_and_grad = whole if accumulate == 1 else accumulated
        opt_state = state.opt_state
        if exchange is None:
            value_and_grads = value_and_grad(state, batch, teacher_variables, key)
        else:
            value_and_grads, opt_state = exchange.gradients(
                value_and_grad, state, batch, teacher_variables, key
            )
        (loss, (means, share, collections, memory, losses)), grads = value_and_grads
        chosen = state.selection
        facts: Metrics = {}
        if selection is not None:
            chosen = selection.record(chosen, batch["index"], losses, state.step)
            facts = {"facts": dict(selection.facts(chosen))}
            if share is None:
                share = jnp.asarray(len(batch["index"]) / len(numbers), jnp.float32)
            facts["facts"]["records_selected"] = share

        dense = grads["network"]
        if upkeep is not None:
            masks = upkeep.masks({"params": state.params["network"], **collections})
            grads = {**grads, "network": masked_tree(dense, masks)}
        updates, opt_state = tx.update(grads, opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        if upkeep is not None:
            variables = upkeep.update(
                {"params": params["network"], **collections},
                dense,
                key=jax.random.fold_in(key, _UPKEEP),
                step=state.step,
                steps_per_epoch=steps_per_epoch,
                total_steps=steps_per_epoch * epochs,
            )
            masks = upkeep.masks(variables)
            collections = {k: v for k, v in variables.items() if k != "params"}
            params = {**params, "network": variables["params"]}
            opt_state = mask_moments(tx, opt_state, params, masks)
            facts = {"facts": {**facts.get("facts", {}), **upkeep.facts(variables)}}
        average = state.average
        if ema is not None:
            variables = {
                "params": params["network"],
                **collections,
                **readout_variables(method, params["method"], memory),
            }
            average = _blend(state.average, variables, ema)
            if READOUT in variables:
                # What the readout remembers goes with its params of now.
                memory_now = {"memory": variables[READOUT]["memory"]}
                average = {**average, READOUT: {**average[READOUT], **memory_now}}
        metrics = {
            "loss": loss,
            "terms": means,
            "learning_rate": schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            **facts,
        }
        new_state = TrainState(
            step=state.step + 1,
            key=state.key,
            params=params,
            collections=collections,
            opt_state=opt_state,
            memory=memory,
            average=average,
            selection=chosen,
        )
        return new_state, metrics

    return step


def _all_views(
    apply: ApplyFn,
    variables: Variables,
    batch: Mapping[str, jax.Array],
    views: Sequence[str],
    *,
    train: bool,
    key: jax.Array | None,
) -> tuple[Outputs, Variables]:
    """Runs a network on the batch and on its further views, one after the other."""
    outputs, collections = apply(variables, batch["image"], train=train, key=key)
    others = {}
    for i, view in enumerate(views, start=1):
        others[view], collections = apply(
            {"params": variables["params"], **collections},
            batch[f"image_{view}"],
            train=train,
            key=None if key is None else jax.random.fold_in(key, i),
        )
    if others:
        outputs = dataclasses.replace(outputs, views=others)
    return outputs, collections


def _blend(average: Any, variables: Any, decay: float) -> Any:
    """The running average after one more step; what is no float is taken as it is."""

    def blend(a: jax.Array, v: jax.Array) -> jax.Array:
        if not jnp.issubdtype(v.dtype, jnp.floating):
            return v
        return decay * a + (1.0 - decay) * v

    return jax.tree.map(blend, average, variables)


def make_eval_step(
    network: ApplyFn, augmentation: Augmentation
) -> Callable[[Variables, Mapping[str, jax.Array]], dict[str, jax.Array]]:
    """Makes `evaluate(variables, batch) -> {"probabilities", "label"}`.

    Probabilities are float32 in the shape of the logits; labels are cropped as the
    images are.
    """

    def evaluate(
        variables: Variables, batch: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        batch = augmentation.evaluate(batch)
        outputs, _ = network(variables, batch["image"], train=False, key=None)
        logits = outputs.logits.astype(jnp.float32)
        return {
            "probabilities": jax.nn.softmax(logits, axis=-1),
            "label": batch["label"],
        }

    return evaluate
