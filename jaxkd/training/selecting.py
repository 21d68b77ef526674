"""What the step does for a selection of records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxkd.distill.method import DataSpec
from jaxkd.select import Selection, SelectionData, create
from jaxkd.training.network import ApplyFn, Network, Variables
from jaxkd.training.schema import ConfigError, at
from jaxkd.training.sections import StagePlan
from jaxkd.training.state import TrainState

Batch = dict[str, jax.Array]


def selection_data(data: DataSpec) -> SelectionData:
    """What a selection is told of the data."""
    return SelectionData(
        records=data.records,
        batch_size=data.batch_size,
        steps_per_epoch=data.steps_per_epoch,
        epochs=data.epochs,
    )


def choose_selection(
    path: str,
    plan: StagePlan,
    data: DataSpec,
    entries: Collection[str],
    networks: Mapping[str, Network],
    learners: Sequence[str],
) -> tuple[Selection | None, Network | None, DataSpec]:
    """The selection of a stage, the network that ranks for it, and what methods see.

    Args:
      path: of the selection in the config, for messages.
      plan: of the stage.
      data: of the stage; its batch is that of one micro-batch.
      entries: what a batch holds beside `image`, `label` and `index`.
      networks: those that were trained before, by name.
      learners: names of those that learn.

    Returns:
      The selection, its scorer, and `data` with the batch that is left of it.

    Raises:
      ConfigError: one line that names the config key and what is wrong.
    """
    if not plan.select:
        return None, None, data
    options = dict(plan.select)
    if "name" not in options:
        raise ConfigError(f"{path}: names no selection, e.g. 'hard_batches'")
    batch_size = data.batch_size * plan.accumulate
    whole = dataclasses.replace(data, batch_size=batch_size)
    with at(path):
        selection = create(options.pop("name"), **options)
        # A selection that weighs sees one micro-batch.
        seen = data if selection.weigh is not None else whole
        jax.eval_shape(
            lambda key: selection.init(key, selection_data(seen)), jax.random.key(0)
        )
        scorer = None
        for name in (selection.scorer, *selection.raters):
            if name is None:
                continue
            if name not in networks or name in learners:
                raise ValueError(
                    f"network {name!r} is not trained by an earlier stage; trained so "
                    f"far: {', '.join(networks) or 'none'}"
                )
        if selection.scorer is not None:
            scorer = networks[selection.scorer]
        if selection.pick is not None or selection.keep is not None:
            given = {
                "config.data.unlabelled_batch_size": "unlabelled_image" in entries,
                f"{path.removesuffix('select')}targets": plan.targets is not None,
            }
            for key, is_given in given.items():
                if is_given:
                    raise ValueError(
                        f"chooses the records of a step, which excludes {key}"
                    )
        if selection.keep is None:
            return selection, scorer, data
        scores = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
        count = jax.eval_shape(selection.keep, scores).shape[0]
        if count % plan.accumulate:
            raise ValueError(
                f"keeps {count} of {batch_size} records, which accumulate "
                f"{plan.accumulate} does not divide"
            )
        data = dataclasses.replace(data, batch_size=count // plan.accumulate)
    return selection, scorer, data


def keeping(
    selection: Selection | None, student: ApplyFn, scorer: ApplyFn | None
) -> Callable[..., tuple[Batch, tuple[Variables, ...]]]:
    """Makes `kept(batch, state, teachers) -> (batch, teachers)`.

    Args:
      selection: chooses the records; without its `keep` nothing changes.
      student: ranks them if there is no scorer.
      scorer: ranks them; its variables are the last of the teachers' and are taken off.

    Returns:
      The function; its batch has the kept records alone, in their order.
    """
    choose = None if selection is None else selection.keep
    if choose is None:
        return lambda batch, state, teachers: (batch, teachers)

    def kept(
        batch: Batch, state: TrainState, teachers: tuple[Variables, ...]
    ) -> tuple[Batch, tuple[Variables, ...]]:
        if scorer is None:
            score, variables = student, state.variables()
        else:
            score, variables, teachers = scorer, teachers[-1], teachers[:-1]
        outputs, _ = score(variables, batch["image"], train=False, key=None)
        places = choose(_cross_entropy(outputs.logits, batch["label"]))
        batch = {name: jnp.take(v, places, axis=0) for name, v in batch.items()}
        return batch, teachers

    return kept


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy of every record by its labels, means over pixels."""
    values = optax.softmax_cross_entropy_with_integer_labels(
        jax.lax.stop_gradient(logits).astype(jnp.float32), labels
    )
    return jnp.mean(values.reshape(len(values), -1), axis=1)


def loss_of_records(
    terms: Mapping[str, jax.Array], weights: Mapping[str, Any], count: int
) -> jax.Array:
    """The loss of each record, float32 `[count]`, without gradient.

    Terms that have no value per record count for all records alike.
    """
    total = jnp.zeros(count, jnp.float32)
    for name, value in terms.items():
        if value.ndim and len(value) == count:
            each = jnp.mean(value.reshape(count, -1), axis=1)
        else:
            each = jnp.full(count, jnp.mean(value))
        total = total + weights[name] * each
    return jax.lax.stop_gradient(total)


def check_by_record(terms: Mapping[str, jax.Array], count: int) -> None:
    """Checks that every term has a value for each record.

    Raises:
      ValueError: one has not.
    """
    for name, value in terms.items():
        if not value.ndim or len(value) != count:
            raise ValueError(
                f"the selection weighs records, but term {name!r} has shape "
                f"{value.shape} and not one value for each of {count} records; take a "
                "selection of batches, or leave the term out"
            )


def weighted(values: jax.Array, by_record: jax.Array) -> jax.Array:
    """Values `[batch, ...]` times the weights of their records."""
    return values * by_record.reshape(-1, *(1,) * (values.ndim - 1))
