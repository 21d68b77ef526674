"""What a stage runs on, put together: feed, teachers, programs and its first state.

The loop trains with an `Assembly`, and the scripts of `bench/` time one, so that what
is timed is what trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxkd.select import Selection
from jaxkd.training import sharding
from jaxkd.training.batches import make_feed
from jaxkd.training.checkpoints import abstract_like
from jaxkd.training.compilation import run_once
from jaxkd.training.dispatch import Programs, make_dispatch, stack_items
from jaxkd.training.feeds import Feed
from jaxkd.training.network import Variables
from jaxkd.training.placement import (
    gathering_stage,
    learner_sharding,
    live_sharding,
)
from jaxkd.training.rating import PickedItems, rate_records
from jaxkd.training.setup import Setup
from jaxkd.training.stage import Stage
from jaxkd.training.state import TrainState
from jaxkd.training.target_files import StageTargets


def untrained(setup: Setup, name: str, shardings: Any = None) -> Variables:
    """The variables that a network's `init` makes, for all seeds.

    Args:
      setup: the run.
      name: the network.
      shardings: where each array shall live; None for all on every device.
    """
    if shardings is None:
        shardings = sharding.replicated(setup.mesh)
    return jax.jit(
        setup.seeds.lift(setup.networks[name].init),
        out_shardings=shardings,
        compiler_options=run_once(),
    )(setup.seeds.keys())


def abstract_state(setup: Setup, stage: Stage) -> tuple[TrainState, TrainState]:
    """Shapes of a stage's state with shardings, and the shardings alone."""
    shardings = setup.seeds.lift_sharding(learner_sharding(setup, stage))
    shapes = jax.eval_shape(setup.seeds.lift(stage.init_state), setup.seeds.keys())
    return abstract_like(shapes, shardings), shardings


class Known:
    """The variables of a run's networks: those in memory, and the way to all others.

    Args:
      setup: the run.
      read: returns the variables of a network that is not frozen, by its name.
    """

    def __init__(self, setup: Setup, read: Callable[[str], Variables]):
        self._setup, self._read = setup, read
        self._kept: dict[str, Variables] = {}

    def __call__(self, name: str) -> Variables:
        """The variables of a network; they are not kept if they were not before."""
        if name in self._kept:
            return self._kept[name]
        if self._frozen(name):
            return untrained(self._setup, name)
        return self._read(name)

    def shapes(self, name: str) -> Any:
        """The shapes of a network's variables for one seed; what is read is kept."""
        if name not in self._kept:
            if self._frozen(name):
                init = self._setup.networks[name].init
                return jax.eval_shape(init, jax.random.key(0))
            self._kept[name] = self._read(name)
        each = self._setup.seeds.each
        return jax.eval_shape(lambda v: each(v)[0], self._kept[name])

    def put(self, name: str, shardings: Any) -> Variables:
        """A network's variables where they shall live; only these are kept.

        Frozen networks are made there: no device ever holds them whole because of it.
        """
        if name not in self._kept and self._frozen(name):
            self._kept[name] = untrained(self._setup, name, shardings)
        else:
            self._kept[name] = jax.device_put(self(name), shardings)
        return self._kept[name]

    def keep(self, variables: Mapping[str, Variables]) -> None:
        """Keeps variables, in place of earlier ones of the same networks."""
        self._kept.update(variables)

    def _frozen(self, name: str) -> bool:
        return self._setup.plan.networks[name].frozen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembly:
    """A stage with all that its steps read but the state.

    Attributes:
      setup: the run.
      stage: the stage.
      feed: makes its batches.
      iterator: over the feed's items.
      teachers: variables of the live teachers, or what stored targets have in their
        place, on the devices.
      programs: its compiled steps.
      abstract: its state, as shapes with shardings.
      shardings: those alone.
    """

    setup: Setup
    stage: Stage
    feed: Feed
    iterator: Any
    teachers: tuple[Variables, ...]
    programs: Programs
    abstract: TrainState
    shardings: TrainState

    def begin(self, known: Known) -> TrainState:
        """The state before the first step, from the networks that the stage names."""
        state = jax.jit(
            self.setup.seeds.lift(self.stage.begin),
            out_shardings=self.shardings,
            compiler_options=run_once(),
        )(self.setup.seeds.keys(), {name: known(name) for name in self.stage.starts})
        selection = self.stage.selection
        if selection is None or selection.begin is None:
            return state
        scores = rate_records(self.setup, selection, known)
        begin = jax.jit(
            self.setup.seeds.lift(selection.begin),
            out_shardings=self.shardings.selection,
        )
        return state.replace(selection=begin(state.selection, scores))  # type: ignore

    def items(self, steps: int, state: TrainState) -> dict[str, jax.Array]:
        """The items of the next steps, stacked, on the devices.

        Args:
          steps: how many.
          state: before these steps; it may pick the records.
        """
        if isinstance(self.iterator, PickedItems):
            found = [self.iterator.following(state) for _ in range(steps)]
        else:
            found = [next(self.iterator) for _ in range(steps)]
        items = stack_items(found)
        leading = 2 if self.setup.seeds.several else 1
        return sharding.put_batch(items, self.setup.mesh, leading=leading)

    def arguments(self, state: TrainState, items: Any) -> tuple[Any, ...]:
        """What a program is called with."""
        return state, self.feed.constants, items, self.teachers

    def close(self) -> None:
        """Ends the threads and processes that read."""
        self.iterator.close()


def assemble(
    setup: Setup, stage: Stage, known: Known, *, targets: StageTargets | None = None
) -> Assembly:
    """Puts a stage together.

    Args:
      setup: the run.
      stage: the stage.
      known: has the variables of the live teachers; it keeps them where the stage
        wants them, in place of whole ones.
      targets: what the stage reads instead of running its teachers.

    Returns:
      The assembly, to be closed when it is done with.
    """
    feed = make_feed(setup, stage, extra=None if targets is None else targets.files)
    abstract, shardings = abstract_state(setup, stage)
    names = [teacher.name for teacher in stage.live_teachers]
    wanted = live_sharding(setup, stage, [known.shapes(name) for name in names])
    placed = gathering_stage(setup, stage, wanted)
    teachers = tuple(
        known.put(name, setup.seeds.lift_sharding(each))
        for name, each in zip(names, wanted, strict=True)
    )
    pick, picked = None, None
    if stage.selection is not None and stage.selection.pick is not None:
        if setup.resident:
            pick = _lifted_pick(setup, stage.selection)
        else:
            part, parts = sharding.process_part(setup.mesh)
            picked = PickedItems(setup.train, stage.selection, part=part, parts=parts)
    programs = Programs(
        name=stage.name,
        dispatch=make_dispatch(
            setup.seeds.lift(placed.train_step(setup.augmentation)), feed, pick
        ),
        state_shardings=shardings,
        metrics_sharding=sharding.replicated(setup.mesh),
    )
    return Assembly(
        setup=setup,
        stage=stage,
        feed=feed,
        # Last: what it starts would have to be ended if anything failed.
        iterator=feed.items() if picked is None else picked,
        teachers=teachers if targets is None else targets.constants,
        programs=programs,
        abstract=abstract,
        shardings=shardings,
    )


def _lifted_pick(setup: Setup, selection: Selection) -> Callable[[Any], jax.Array]:
    pick: Any = selection.pick
    lifted = setup.seeds.lift(pick)
    return lambda state: lifted(state.selection)
