"""Exact evaluation: every test record counts once, on any number of devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxkd.data import Source, pipeline
from jaxkd.metrics.evaluators import ClassificationEvaluator, SegmentationEvaluator
from jaxkd.training import sharding
from jaxkd.training.network import ApplyFn, Network, Variables
from jaxkd.training.progress import TrainingFailed
from jaxkd.training.setup import Setup
from jaxkd.training.step import make_eval_step

MAX_PREDICTIONS = 64


class NotFinite(TrainingFailed):
    """A network predicts NaN or infinity."""


class Evaluation:
    """Evaluates networks on the test split of a run.

    Compiled steps are kept per network, so that evaluating again costs no compilation.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        self._steps: dict[ApplyFn, Callable[..., Any]] = {}
        count = min(MAX_PREDICTIONS, len(setup.test))
        self._shown = np.linspace(0, len(setup.test) - 1, count).astype(int)

    def metrics(
        self, network: Network, variables: Variables, *, surface: bool = True
    ) -> dict[str, float]:
        """The metrics of a network.

        Args:
          network: the network.
          variables: its variables.
          surface: with the surface distances of segmentations, which are slow.
        """
        evaluator = self._evaluator()
        for records in self._predict(network, variables):
            evaluator.update(**{k: records[k] for k in _FOR_METRICS})
        if isinstance(evaluator, SegmentationEvaluator):
            return evaluator.result(surface=surface)
        return evaluator.result()

    def judge(self, network: Network, variables: Variables) -> Judged:
        """Passes the test split through a network once, for all that is told of it."""
        evaluator = self._evaluator()
        shown: dict[int, dict[str, np.ndarray]] = {}
        wanted = set(self._shown.tolist())
        for records in self._predict(network, variables):
            evaluator.update(**{k: records[k] for k in _FOR_METRICS})
            for i, index in enumerate(records["index"].tolist()):
                if index in wanted:
                    # A view would keep its whole batch.
                    shown[index] = {k: np.array(v[i]) for k, v in records.items()}
        images = displayable(self._images(sorted(shown)))
        return Judged(network.name, evaluator, shown, images)

    def _evaluator(self) -> ClassificationEvaluator | SegmentationEvaluator:
        test = self.setup.test
        if self.setup.task == "classification":
            return ClassificationEvaluator(
                num_classes=test.info.num_classes, class_names=test.info.class_names
            )
        return SegmentationEvaluator(
            num_classes=test.info.num_classes,
            class_names=test.info.class_names,
            groups=test.groups,
            threshold=self.setup.plan.evaluation.threshold,
        )

    def _predict(self, network: Network, variables: Variables) -> Any:
        """Yields the valid records of each batch, with probabilities, as NumPy."""
        setup = self.setup
        if network.apply not in self._steps:
            step = make_eval_step(network.apply, setup.plan.data.augment)
            self._steps[network.apply] = jax.jit(
                step, out_shardings=sharding.batch_sharding(setup.mesh)
            )
        step = self._steps[network.apply]
        index, count = sharding.process_part(setup.mesh)
        batches = pipeline.eval_batches(
            setup.test,
            batch_size=setup.eval_batch_size,
            workers=_workers(setup.test, setup.plan.data.workers),
            process_index=index,
            process_count=count,
        )
        for batch in batches:
            arrays = sharding.put_batch(batch, setup.mesh)
            # The step returns labels cropped as the network saw the images.
            records = {k: arrays[k] for k in ("index", "valid")}
            records |= step(variables, arrays)
            if jax.process_count() > 1:
                records = multihost_utils.process_allgather(records, tiled=True)
            host: Any = jax.device_get(records)
            valid = host.pop("valid")
            host = {k: np.asarray(v)[valid] for k, v in host.items()}
            finite = np.isfinite(host["probabilities"].reshape(len(host["index"]), -1))
            if not finite.all():
                record = host["index"][~finite.all(axis=1)][0]
                raise NotFinite(
                    f"predictions of network {network.name!r} for test record "
                    f"{record} are not finite"
                )
            yield host

    def _images(self, indices: list[int]) -> np.ndarray:
        """The images under the crop that evaluation uses, before normalisation."""
        box = self.setup.plan.data.augment.crop_box
        images = np.stack([self.setup.test[i]["image"] for i in indices])
        if box is not None:
            top, bottom, left, right = box
            images = images[:, top:bottom, left:right]
        return images


class Judged:
    """What a network says of the test split.

    Args:
      network: its name.
      evaluator: has seen all records.
      shown: label and probabilities of some of them, by their numbers.
      images: of those, in the order of their numbers.
    """

    def __init__(
        self,
        network: str,
        evaluator: ClassificationEvaluator | SegmentationEvaluator,
        shown: Mapping[int, Mapping[str, np.ndarray]],
        images: np.ndarray,
    ):
        self._network, self._evaluator = network, evaluator
        self._shown, self._images = shown, images

    def metrics(self, *, surface: bool = True) -> dict[str, float]:
        """The metrics, see `Evaluation.metrics`."""
        if isinstance(self._evaluator, SegmentationEvaluator):
            return self._evaluator.result(surface=surface)
        return self._evaluator.result()

    def predictions(self) -> dict[str, np.ndarray]:
        """Arrays for `predictions.npz`.

        Up to 64 test records evenly spread over the split, with the network's
        predictions.
        """
        indices = sorted(self._shown)
        shown = [self._shown[i] for i in indices]
        probabilities = np.stack([each["probabilities"] for each in shown])
        arrays = {
            "index": np.array(indices),
            "image": self._images,
            "truth": np.stack([each["label"] for each in shown]).astype(np.int32),
        }
        if isinstance(self._evaluator, SegmentationEvaluator):
            predictions = self._evaluator.predict(probabilities).astype(np.uint8)
        else:
            predictions = probabilities.argmax(-1)
            arrays[f"probabilities/{self._network}"] = probabilities
            arrays[f"confusion/{self._network}"] = self._evaluator.confusion()
        arrays[f"prediction/{self._network}"] = predictions
        return arrays


_FOR_METRICS = ("index", "label", "probabilities")


def _workers(source: Source, workers: int) -> int:
    """How many processes read for an evaluation.

    Each evaluation starts its own and ends them, which takes longer than to read
    records that lie in memory: those of sources with `take`.
    """
    return 0 if hasattr(source, "take") else workers


def displayable(images: np.ndarray) -> np.ndarray:
    """Images `[n, h, w, c]` as uint8 `[n, h, w]` or `[n, h, w, 3]` for pictures.

    uint8 stays as it is; other types are stretched from their minimum to maximum.
    """
    if images.dtype != np.uint8:
        low, high = float(images.min()), float(images.max())
        scale = 255.0 / (high - low) if high > low else 0.0
        images = ((images - low) * scale).round().astype(np.uint8)
    return images if images.shape[-1] == 3 else images[..., 0]
