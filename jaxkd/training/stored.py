"""Teachers whose answers are stored: what is kept of them, and how a step reads it.

`--mode=label` shows the augmented training images to the teachers and writes what they
say (`jaxkd.training.labelling`, `jaxkd.data.targets`). Because every record draws its
augmentation from `(key, epoch, index)`, view `v` of a record is what epoch `v` shows: a
student that repeats the draws of epoch `e % views` sees the very image that its
teachers saw.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd.data.target_codecs import Codec, Codes, Field, Full, TopK
from jaxkd.distill.method import DataSpec, Inputs, Method, Progress, Specs
from jaxkd.layers import NetworkSpec, Outputs
from jaxkd.numerics import kept_classes
from jaxkd.training.network import Network, Variables
from jaxkd.training.paths import path_name
from jaxkd.training.schema import ConfigError, at
from jaxkd.training.sections import TargetsPlan
from jaxkd.training.step import Augments

# Entries of a batch that no stored answer fits, and what makes them.
_UNKEYED = {
    "target": (
        "config.data.augment.mixup and .cutmix mix whole batches, and config.data."
        "regions has labels of its own"
    ),
    "image_strong": "config.data.augment.strong shows the teachers another view",
    "unlabelled_image": "unlabelled images are not labelled",
}


@dataclasses.dataclass(frozen=True)
class StoredViews:
    """An augmentation that goes round the stored views.

    Attributes:
      augmentation: what makes them.
      views: how many there are.
      seed: of their draws; None draws from the step's key.
    """

    augmentation: Augments
    views: int
    seed: int | None = None

    def train(
        self,
        batch: Mapping[str, jax.Array],
        *,
        key: jax.Array,
        epoch: int | jax.Array,
        num_classes: int,
    ) -> dict[str, jax.Array]:
        """Augments as `Augmentation.train` does in epoch `epoch % views`."""
        return self.augmentation.train(
            batch,
            key=key if self.seed is None else jax.random.key(self.seed),
            epoch=epoch % self.views,
            num_classes=num_classes,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTeachers:
    """What is stored of the teachers of a stage.

    Attributes:
      plan: the stage's targets.
      teachers: shapes of the teachers' outputs.
      with_head: for each teacher, whether the method reads its last linear layer.
      norms: for each teacher, the batch norms that the method reads.
      input_shape: `(height, width, channels)` of the images.
    """

    plan: TargetsPlan
    teachers: tuple[NetworkSpec, ...]
    with_head: tuple[bool, ...]
    norms: tuple[tuple[str, ...], ...]
    input_shape: tuple[int, ...]

    @property
    def codecs(self) -> dict[str, Codec]:
        """How each stored array is packed, by its name in a batch."""
        plan, codecs = self.plan, {}
        for i, spec in enumerate(self.teachers):
            codecs[f"teacher{i}/logits"] = _logits_codec(plan, spec.logits)
            for tap in spec.taps:
                if tap in plan.taps:
                    name = f"teacher{i}/taps/{tap}"
                    codecs[name] = Full(spec.taps[tap], plan.taps_dtype)
        return codecs

    @property
    def fields(self) -> dict[str, Field]:
        """The packed arrays of one record, by their names in a batch."""
        return {
            f"{name}/{part}": field
            for name, codec in self.codecs.items()
            for part, field in codec.fields.items()
        }

    def answers(self, outputs: Sequence[Outputs]) -> dict[str, jax.Array]:
        """What is stored of the teachers' outputs, in float32 and not packed."""
        found = {}
        for name in self.codecs:
            teacher, what = _parse(name)
            taps = outputs[teacher].taps
            value = outputs[teacher].logits if what is None else taps[what]
            found[name] = value.astype(jnp.float32)
        return found

    def encode(self, answers: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Packs answers."""
        return {
            f"{name}/{part}": value
            for name, codec in self.codecs.items()
            for part, value in codec.encode(answers[name]).items()
        }

    def outputs(
        self, batch: Mapping[str, jax.Array], constants: Sequence[Variables]
    ) -> tuple[Outputs, ...]:
        """What the teachers said of a batch; pure, to be called under jit.

        Args:
          batch: with the packed arrays.
          constants: see `constants`.

        Returns:
          For each teacher its logits and its stored taps, in float32.
        """
        # In depth order, which jax.tree keeps for this type alone.
        taps = {i: collections.OrderedDict() for i in range(len(self.teachers))}
        logits = {}
        for name, codec in self.codecs.items():
            teacher, tap = _parse(name)
            value = codec.decode(packed(batch, name))
            if tap is None:
                logits[teacher] = value
            else:
                taps[teacher][tap] = value
        return tuple(
            Outputs(logits=logits[i], taps=taps[i], **fixed)
            for i, fixed in enumerate(constants)
        )

    def constants(self, outputs: Sequence[Outputs]) -> tuple[Variables, ...]:
        """What is the same for all images: the layers that the method reads.

        They take the place of the teachers' variables in a step.
        """
        return tuple(
            {
                "head": dict(o.head) if with_head else None,
                "norms": {name: dict(o.norms[name]) for name in norms},
            }
            for o, with_head, norms in zip(
                outputs, self.with_head, self.norms, strict=True
            )
        )

    def augmentation(self, augmentation: Augments) -> StoredViews:
        """The augmentation whose views are stored."""
        return StoredViews(augmentation, self.plan.views, self.plan.seed)


def _parse(name: str) -> tuple[int, str | None]:
    """Of an array's name the number of its teacher, and its tap; None for logits."""
    teacher, _, what = name.removeprefix("teacher").partition("/")
    return int(teacher), None if what == "logits" else what.removeprefix("taps/")


def packed(batch: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The parts of one packed array out of a batch."""
    head = f"{name}/"
    return {k.removeprefix(head): v for k, v in batch.items() if k.startswith(head)}


def _logits_codec(plan: TargetsPlan, shape: tuple[int, ...]) -> Codec:
    if plan.format == "uint8":
        return Codes(shape)
    if plan.top_k is not None:  # which goes with the format "topk" alone
        return TopK(shape, plan.top_k, plan.dtype)
    return Full(shape, plan.dtype)


def store_teachers(
    path: str,
    plan: TargetsPlan,
    *,
    method: Method,
    student: Network,
    teachers: Sequence[Network],
    data: DataSpec,
    entries: Collection[str],
    input_shape: Sequence[int],
) -> StoredTeachers | None:
    """Checks that a stage can read stored answers, and says what they hold.

    Args:
      path: the stage's place in the config.
      plan: the stage's targets.
      method: its losses.
      student: the network that learns.
      teachers: those whose answers are stored.
      data: what the method is told of the data.
      entries: what a batch holds beside `image`, `label` and `index`.
      input_shape: `(height, width, channels)` of the images.

    Returns:
      What is stored; None for labels of regions, which another run reads.

    Raises:
      ConfigError: one line that names the config key and what is wrong.
    """
    here = f"{path}.targets"
    if not teachers:
        raise ConfigError(f"{here}: {path}.teachers names none whose answers to store")
    if plan.regions is not None:
        return _check_regions(here, plan, teachers, entries)
    for entry, reason in _UNKEYED.items():
        if entry in entries:
            raise ConfigError(
                f"{here}: stored answers are those of single augmented images; "
                f"{reason}. Leave it out, or leave targets out"
            )
    if method.views or method.prepare is not None:
        raise ConfigError(
            f"{here}: the method shows further views to the teachers, of which no "
            "answers are stored; leave targets out"
        )
    if method.teacher_mode == "train":
        raise ConfigError(
            f"{here}: the method runs its teachers in training mode, where an answer "
            "depends on the whole batch; leave targets out, or set the method's "
            "option to 'eval'"
        )
    known = {tap for teacher in teachers for tap in teacher.spec.taps}
    for tap in plan.taps:
        if tap not in known:
            raise ConfigError(
                f"{here}.taps: no teacher has a tap {tap!r}; there are "
                f"{', '.join(sorted(known)) or 'none'}"
            )
    look = functools.partial(
        teacher_reads,
        method,
        student=student,
        teachers=teachers,
        data=data,
        input_shape=input_shape,
    )
    reads = look()
    missing = [
        tap
        for teacher, read in zip(teachers, reads, strict=True)
        for tap in teacher.spec.taps
        if f"taps/{tap}" in read and tap not in plan.taps
    ]
    if missing:
        raise ConfigError(
            f"{here}.taps: the method reads {', '.join(dict.fromkeys(missing))} of "
            f"its teachers and {', '.join(plan.taps) or 'none'} stored; add what is "
            "missing"
        )
    # Methods may choose among the taps that are there.
    with at(f"{here}.taps"):
        same = reads == look(taps=plan.taps)
    if not same:
        raise ConfigError(
            f"{here}.taps: with {', '.join(plan.taps)} alone the method would read "
            "other taps than with live teachers; name its taps in the method's options"
        )
    stored = StoredTeachers(
        plan=plan,
        teachers=tuple(t.spec for t in teachers),
        with_head=tuple(any(k.startswith("head/") for k in read) for read in reads),
        norms=tuple(
            tuple(
                n for n in t.spec.norms if any(k.startswith(f"norms/{n}/") for k in r)
            )
            for t, r in zip(teachers, reads, strict=True)
        ),
        input_shape=tuple(input_shape),
    )
    with at(f"{here}"):
        _ = stored.fields
    return stored


def _check_regions(
    here: str,
    plan: TargetsPlan,
    teachers: Sequence[Network],
    entries: Collection[str],
) -> None:
    """Checks what labels of regions need."""
    if len(teachers) > 1:
        raise ConfigError(
            f"{here}.regions: one teacher labels regions, and there are {len(teachers)}"
        )
    logits = teachers[0].spec.logits
    if len(logits) > 1:
        raise ConfigError(f"{here}.regions: needs a classifier, one label per image")
    if "target" in entries:
        raise ConfigError(f"{here}.regions: {_UNKEYED['target']}; leave it out")
    with at(f"{here}.label_format"):
        kept_classes(plan.label_format, teachers[0].spec.num_classes)


def teacher_reads(
    method: Method,
    *,
    student: Network,
    teachers: Sequence[Network],
    data: DataSpec,
    input_shape: Sequence[int],
    taps: Collection[str] | None = None,
) -> tuple[frozenset[str], ...]:
    """What a method reads of its teachers' outputs, by abstract evaluation.

    Args:
      method: the losses.
      student: the network that learns.
      teachers: the networks it learns from.
      data: what the method is told of the data.
      input_shape: `(height, width, channels)` of the images.
      taps: those that the teachers' outputs have; None for all.

    Returns:
      For each teacher, paths such as `"logits"`, `"taps/stage1"`, `"head/kernel"`.
    """
    specs = Specs(
        student=student.spec, teachers=tuple(t.spec for t in teachers), data=data
    )
    key = jax.eval_shape(jax.random.key, 0)
    images = jax.ShapeDtypeStruct((data.batch_size, *input_shape), jnp.float32)

    def run(network: Network, train: bool) -> Any:
        variables = jax.eval_shape(network.init, key)
        return jax.eval_shape(
            lambda v, x, k: network.apply(v, x, train=train, key=k if train else None),
            variables,
            images,
            key,
        )[0]

    integer = jax.ShapeDtypeStruct((), jnp.int32)
    rows = jax.ShapeDtypeStruct((data.batch_size,), jnp.int32)
    dense = student.spec.logits[:-1]
    labels = jax.ShapeDtypeStruct((data.batch_size, *dense), jnp.int32)
    params, memory = jax.eval_shape(lambda k: method.init(k, specs), key)
    outputs = tuple(run(t, False) for t in teachers)
    if taps is not None:
        outputs = tuple(
            o.replace(
                taps=collections.OrderedDict(
                    (name, tap) for name, tap in o.taps.items() if name in taps
                )
            )
            for o in outputs
        )

    def terms(teachers: Any, student: Any, others: Any) -> Any:
        params, memory, batch, key, (step, epoch) = others
        inputs = Inputs(
            student=student,
            teachers=teachers,
            batch=batch,
            key=key,
            progress=Progress(step=step, epoch=epoch, epochs=data.epochs),
        )
        return method.terms(params, memory, inputs)

    batch = {"image": images, "label": labels, "index": rows}
    others = (params, memory, batch, key, (integer, integer))
    traced = jax.make_jaxpr(terms)(outputs, run(student, True), others).jaxpr
    used = {id(v) for equation in traced.eqns for v in equation.invars}
    used |= {id(v) for v in traced.outvars}
    leaves = jax.tree.leaves_with_path(outputs)
    reads: list[set[str]] = [set() for _ in teachers]
    for (path, _), variable in zip(leaves, traced.invars, strict=False):
        if id(variable) in used:
            reads[path[0].idx].add(path_name(path[1:]))
    return tuple(frozenset(read) for read in reads)
