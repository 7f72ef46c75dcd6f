"""Features of a small network trained on the dataset's own labels."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lpc_runner.base.errors import UserError
from lpc_runner.base.files import is_refusal, write_cache
from lpc_runner.base.tensors import exact_arithmetic, generator, hash_of_tensors, he_uniform, to_unit
from lpc_runner.data.dataset import Data, Split
from lpc_runner.evaluation.features import Extractor

_log = logging.getLogger(__name__)


class Classifier(Extractor):
    """Penultimate features, 128-d, of a small convolutional network trained once on the real labels.

    Three 3x3 convolutions with group normalisation and ReLU, averaged over positions, one linear layer;
    AdamW. Trained from a fixed seed and kept in `cache_dir` with its accuracy on the test split, under a name
    made of the data, the architecture and `VERSION`: another machine may round differently, so quote numbers
    with the hash.
    """

    name = "classifier"
    dimension = 128

    VERSION = 1  # raise when anything below changes what is learned
    WIDTHS, STRIDES, GROUPS = (32, 64, 128), (2, 1, 2), 8
    BATCH_SIZE, MIN_EPOCHS, MIN_UPDATES = 64, 5, 400
    LEARNING_RATE, WEIGHT_DECAY, NUM_WARMUP = 3e-3, 1e-2, 20

    def __init__(
        self, data: Data, identity: dict[str, object], cache_dir: Path, device: torch.device | str = "cpu"
    ) -> None:
        self._data, self._identity, self._cache_dir, self._device = data, identity, Path(cache_dir), device
        self._weights: dict[str, Tensor] = {}
        self.accuracy = float("nan")

    def prepare(self) -> None:
        """Read the trained network or train it; UserError when a split has no labels."""
        train, test = self._data.train, self._data.test
        if train.labels is None or test.labels is None:
            raise UserError(
                "metrics.extractor=classifier learns from labels and the dataset has none; "
                "use metrics.extractor=random_conv, imagenet or inception"
            )
        path = self._cache_dir / f"classifier-{self._key()[:16]}.pt"
        if not (path.exists() and self._read(path)):
            classes, targets = train.labels.cpu().unique(return_inverse=True)  # labels may be any integers
            self._train(train.means, targets)
            self.fingerprint = hash_of_tensors(self._weights)
            self.accuracy = self._accuracy(test, classes)
            weights = {name: weight.cpu() for name, weight in self._weights.items()}
            buffer = io.BytesIO()
            torch.save({"weights": weights, "accuracy": self.accuracy, "fingerprint": self.fingerprint}, buffer)
            write_cache(path, buffer.getvalue())

    def facts(self) -> dict[str, object]:
        return super().facts() | {"extractor_accuracy": self.accuracy}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with exact_arithmetic():
            return self._features(images)

    def _key(self) -> str:
        settings = (self.VERSION, self.WIDTHS, self.STRIDES, self.GROUPS, self.BATCH_SIZE, self.MIN_EPOCHS)
        settings += (self.MIN_UPDATES, self.LEARNING_RATE, self.WEIGHT_DECAY, self.NUM_WARMUP)
        content = {
            f"{name} {part}": content
            for name, split in (("train", self._data.train), ("test", self._data.test))
            for part, content in (("values", split.means), ("labels", split.labels))
            if content is not None
        }
        named = json.dumps([settings, self._identity, hash_of_tensors(content)], sort_keys=True, default=str)
        return hashlib.sha256(named.encode()).hexdigest()

    def _read(self, path: Path) -> bool:
        """Whether the file held a whole network, which is then in place."""
        try:
            saved = torch.load(path, map_location=self._device, weights_only=True)
            if hash_of_tensors(saved["weights"]) != saved["fingerprint"]:
                raise ValueError("its hash does not fit its weights")
            accuracy = float(saved["accuracy"])
        except Exception as error:  # torch.load raises almost anything on a damaged file
            what = "cannot be read" if is_refusal(error) else "is damaged"
            _log.warning("%s %s (%s); training the classifier again", path, what, type(error).__name__)
            return False
        self._weights, self.fingerprint, self.accuracy = saved["weights"], saved["fingerprint"], accuracy
        return True

    def _features(self, images: Tensor) -> Tensor:
        hidden, weights = to_unit(images, self._device), self._weights
        for i, stride in enumerate(self.STRIDES):
            hidden = functional.conv2d(hidden, weights[f"conv{i}"], stride=stride, padding=1)
            hidden = functional.group_norm(hidden, self.GROUPS, weights[f"scale{i}"], weights[f"shift{i}"]).relu()
        return hidden.mean((2, 3))

    def _logits(self, images: Tensor) -> Tensor:
        return functional.linear(self._features(images), self._weights["output"], self._weights["bias"])

    def _initial_weights(self, num_channels: int, num_classes: int) -> dict[str, Tensor]:
        widths = (num_channels, *self.WIDTHS)
        weights = {"output": he_uniform((num_classes, self.dimension), "classifier/output")}
        weights["bias"] = torch.zeros(num_classes)
        for i, width in enumerate(self.WIDTHS):
            weights[f"conv{i}"] = he_uniform((width, widths[i], 3, 3), f"classifier/{i}")
            weights[f"scale{i}"], weights[f"shift{i}"] = torch.ones(width), torch.zeros(width)
        return {name: weight.to(self._device).requires_grad_() for name, weight in weights.items()}

    @torch.enable_grad()
    def _train(self, images: Tensor, targets: Tensor) -> None:
        """Cross-entropy for a fixed number of updates, learning rate warmed up and then falling to 0."""
        self._weights = self._initial_weights(images.shape[1], int(targets.max()) + 1)
        optimizer = torch.optim.AdamW(self._weights.values(), lr=self.LEARNING_RATE, weight_decay=self.WEIGHT_DECAY)
        updates_per_epoch = math.ceil(len(images) / self.BATCH_SIZE)
        num_epochs = max(self.MIN_EPOCHS, math.ceil(self.MIN_UPDATES / updates_per_epoch))
        words = "training the classifier for sample quality: %d epochs of %d updates"
        _log.info(words, num_epochs, updates_per_epoch)
        update = 0
        with exact_arithmetic():
            for epoch in range(num_epochs):
                order = torch.randperm(len(images), generator=generator(0, "classifier/batches", epoch))
                for batch in order.split(self.BATCH_SIZE):
                    progress = update / (num_epochs * updates_per_epoch)
                    warmth = min(1, (update + 1) / self.NUM_WARMUP)
                    optimizer.param_groups[0]["lr"] = self.LEARNING_RATE * warmth * (1 - progress)
                    logits = self._logits(images[batch])
                    loss = functional.cross_entropy(logits, targets[batch].to(logits.device))
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    update += 1
        self._weights = {name: weight.detach() for name, weight in self._weights.items()}

    @torch.no_grad()
    def _accuracy(self, test: Split, classes: Tensor) -> float:
        assert test.labels is not None  # as `prepare` requires
        with exact_arithmetic():
            guesses = [self._logits(part).argmax(1).cpu() for part in test.means.split(512)]
        return (classes[torch.cat(guesses)] == test.labels.cpu()).double().mean().item()
