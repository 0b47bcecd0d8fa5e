"""Batches that are copied ahead on a stream of their own, and augmentation on the device."""

from __future__ import annotations

import torch

from bigops.train import Sampler
from bigops.train.data import Arrays, Augment, Loader
from tests.gpu.conftest import Place


def test_copied_batches_and_their_augmentation_are_those_of_the_cpu(place: Place) -> None:
    images = torch.randint(0, 256, (96, 3, 20, 24)).byte()
    data = Arrays(images, torch.arange(96))
    device = place.put([images[:1]])[0].device
    augment = Augment(
        rotation_range=30,
        zoom_range=0.2,
        width_shift_range=0.1,
        horizontal_flip=True,
        brightness_range=(0.5, 1.5),
        fill_mode="reflect",
        rescale=1 / 255,
    )
    sampler = Sampler(96, 16, seed=3)
    for epoch in range(2):
        for step, (batch, rows) in enumerate(Loader(data, sampler, device=device)):
            assert batch.device == device
            assert torch.equal(rows.cpu(), sampler.taken.indices)
            assert sampler.state_dict()["samples_seen"] == 16 * (step + 1)
            here = augment(batch, rows, epoch)
            there = augment(images[rows.cpu()], rows.cpu(), epoch)
            assert (here.cpu() - there).abs().max() < 1e-3  # of values up to 1: cosines differ
