"""Methods that bring the two embeddings of a record together, those of others apart."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxkd import losses
from jaxkd.distill.embeddings import embed_both, init_heads
from jaxkd.distill.method import (
    Inputs,
    Memory,
    Method,
    Params,
    Scheduled,
    Specs,
    Terms,
)
from jaxkd.distill.negatives import class_tables, draw_negatives, draw_positives
from jaxkd.distill.registry import register
from jaxkd.distill.relations import check_batch
from jaxkd.losses.checks import check_fraction, check_positive


@register()
def crd(
    *,
    factor: Scheduled = 0.8,
    negatives: int = 16384,
    dim: int = 128,
    temperature: Scheduled = 0.07,
    momentum: float = 0.5,
    mode: Literal["exact", "relax"] = "exact",
    records: int | None = None,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
) -> Method:
    """The same record and not another, by contrast with thousands (Tian et al., 2020).

    A dense layer on each side makes embeddings v of unit length. Two banks M remember
    one embedding per training record. The student is asked to tell the teacher's
    remembered embedding of its record from those of `negatives` records of other
    classes, and the teacher's side the reverse:

        factor * mean_i [nce(v_s, M_t) + nce(v_t, M_s)]
        nce = -log(o_0 / (o_0 + K/N)) - sum_k log((K/N) / (o_k + K/N))
        o_k = exp(M_k . v / temperature) / Z

    Then the rows of the batch move: `M <- l2(momentum M + (1 - momentum) v)`. The
    constants Z are the mean of the exponentials of the first batch times N, and stay.

    Needs: the pooled vector of both networks, of any widths; the class of every
    training record and `batch["index"]`. The heads of both sides are trained. Memory:
    two banks `[records, dim]`, Z, and the records sorted by class, all part of the
    checkpoint. Negatives are drawn on the device at each step, distinct for each
    example; with replacement if a class has fewer than `negatives` others, as in small
    data sets.

    Cost: products `[b, dim] x [dim, records]` for each bank, and `b * negatives` draws.
    Every step reads both banks (51 MB for 50,000 records).

    Pitfalls: Z is set by the first batch and scales the loss from then on; it belongs
    to the checkpoint as much as the banks do. Class labels choose the negatives, so the
    method cannot be used on unlabelled records.

    Paper and code: banks, NCE and the frozen Z are those of the authors' code. There a
    negative is drawn anew by each loader process; here the draw is a function of the
    run's key and step.

    Published: CIFAR-100, 240 epochs: 75.51 for ResNet-8x4 from ResNet-32x4 (alone
    72.50, teacher 79.42), 71.16 for ResNet-20 from ResNet-56 (alone 69.06, teacher
    72.34); authors' table.

    Args:
      factor: of the loss; a number or a schedule.
      negatives: records of other classes per example, K.
      dim: width of the embeddings.
      temperature: divides the products; a number or a schedule.
      momentum: share of the remembered embedding in an update.
      mode: the positive is the record itself ("exact") or a random record of its class
        ("relax").
      records: rows of the banks, N; by default one for each training record, and not
        fewer.
      student_tap: a vector of the student; "pooled" by default.
      teacher_tap: a vector of the teacher; "pooled" by default.

    Raises:
      ValueError: an option is not positive, or `momentum` not between 0 and 1.

    Reference:
      Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020.
    """
    check_positive("factor", factor)
    check_positive("negatives", negatives)
    check_positive("dim", dim)
    check_positive("temperature", temperature)
    check_fraction("momentum", momentum)
    taps = {"student_tap": student_tap, "teacher_tap": teacher_tap}

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        rows = specs.data.records if records is None else records
        if rows < specs.data.records:
            raise ValueError(
                f"crd remembers one embedding per training record: records is {rows}, "
                f"the data have {specs.data.records}"
            )
        heads, student, teacher = jax.random.split(key, 3)
        bound = math.sqrt(3 / dim)
        return init_heads(heads, specs, dim, **taps), {
            "bank_s": jax.random.uniform(
                student, (rows, dim), minval=-bound, maxval=bound
            ),
            "bank_t": jax.random.uniform(
                teacher, (rows, dim), minval=-bound, maxval=bound
            ),
            # Zero until the first step sets them.
            "z_s": jnp.zeros((), jnp.float32),
            "z_t": jnp.zeros((), jnp.float32),
            "tables": class_tables(specs.data.labels),
        }

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        index = inputs.batch["index"]
        negative_key, positive_key = jax.random.split(inputs.key)
        tables, positive = memory["tables"], index
        if mode == "relax":
            positive = draw_positives(positive_key, tables, index)
        others = draw_negatives(negative_key, tables, index, count=negatives)
        compared = jnp.concatenate([positive[:, None], others], axis=1)

        student, teacher = embed_both(params, inputs.student, inputs.teacher, **taps)
        arrays = (student, teacher, memory["bank_s"], memory["bank_t"], compared)
        present = inputs.at(temperature)
        first = losses.crd_normalizers(*arrays, temperature=present)
        z_s, z_t = (
            jnp.where(memory[name] > 0, memory[name], now)
            for name, now in zip(("z_s", "z_t"), first, strict=True)
        )
        value = losses.crd(*arrays, normalizers=(z_s, z_t), temperature=present)
        banks = {
            name: losses.update_bank(memory[name], new, index, momentum=momentum)
            for name, new in (("bank_s", student), ("bank_t", teacher))
        }
        return {"crd": value}, {**memory, **banks, "z_s": z_s, "z_t": z_t}

    return Method(init=init, terms=terms, weights={"crd": factor}, num_teachers=1)


@register()
def crd_in_batch(
    *,
    factor: Scheduled = 0.8,
    dim: int = 128,
    temperature: Scheduled = 0.07,
    student_tap: str | None = None,
    teacher_tap: str | None = None,
) -> Method:
    """Contrast as in CRD, with the other classes of the batch in place of banks.

    This is our variant, not a published method. Embeddings v of the student and e of
    the teacher have unit length, as in `crd`; a record is told from those of other
    classes in the same global batch by a softmax in both directions:

        factor * mean_i [log sum_j exp(a_ij - a_ii) + log sum_j exp(a_ji - a_ii)]
        a_ij = v_i . e_j / temperature,    j = i or of another class

    It differs from `crd` in three ways: negatives are the batch's, a few dozen in place
    of 16384, and up to date; the loss is the softmax form (InfoNCE), which has no
    constant Z; and both members of a negative pair get a gradient.

    Needs: the pooled vector of both networks, of any widths; one label per image. The
    heads of both sides are trained; nothing is remembered. The batch must have two
    examples, and should be large.

    Cost: two small dense layers and a product `[b, dim] x [dim, b]`.

    Pitfalls: a batch with one class has loss 0. The factor is that of `crd`, whose
    values are larger; tune it.

    Args:
      factor: of the loss; a number or a schedule.
      dim: width of the embeddings.
      temperature: divides the products; a number or a schedule.
      student_tap: a vector of the student; "pooled" by default.
      teacher_tap: a vector of the teacher; "pooled" by default.

    Raises:
      ValueError: an option is not positive.

    Reference:
      Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, for
      the embeddings and the temperature.
    """
    check_positive("factor", factor)
    check_positive("dim", dim)
    check_positive("temperature", temperature)
    taps = {"student_tap": student_tap, "teacher_tap": teacher_tap}

    def init(key: jax.Array, specs: Specs) -> tuple[Params, Memory]:
        check_batch("crd_in_batch", specs)
        if len(specs.student.logits) != 1:
            raise ValueError(
                f"method 'crd_in_batch' needs one label per image; network "
                f"{specs.student.name!r} has logits of shape {specs.student.logits}"
            )
        return init_heads(key, specs, dim, **taps), {}

    def terms(params: Params, memory: Memory, inputs: Inputs) -> tuple[Terms, Memory]:
        student, teacher = embed_both(params, inputs.student, inputs.teacher, **taps)
        value = losses.crd_in_batch(
            student, teacher, inputs.labels, temperature=inputs.at(temperature)
        )
        return {"crd_in_batch": value}, memory

    return Method(
        init=init, terms=terms, weights={"crd_in_batch": factor}, num_teachers=1
    )
