"""Frozen weights in host memory: really freed, and the same afterwards."""

import pytest
import torch

from nemo_minitron.distillation.offload import HostWeights


def _tensors() -> list[torch.Tensor]:
    base = torch.randn(6, 4)
    return [torch.randn(3, 5), base, base[2:], torch.randn(7).bfloat16(), torch.empty(0)]


def test_storages_are_freed_and_come_back_as_they_were():
    tensors = _tensors()
    before = [tensor.clone() for tensor in tensors]
    weights = HostWeights(tensors)
    assert weights.nbytes == 4 * (15 + 24) + 2 * 7, "a shared storage counts once"
    for _ in range(2):
        weights.release()
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0] * 5
        weights.fetch()
        for tensor, want in zip(tensors, before, strict=True):
            assert torch.equal(tensor, want)
    assert tensors[1][2:].data_ptr() == tensors[2].data_ptr(), "views share their storage still"


def test_kept_storages_stay():
    tensors = _tensors()
    weights = HostWeights(tensors, keep=[tensors[2]])
    weights.release()
    sizes = [tensor.untyped_storage().nbytes() for tensor in tensors]
    assert sizes == [0, 96, 96, 0, 0], "what shares a kept storage stays too"


def test_weights_leave_the_device_also_after_an_error():
    tensors = _tensors()
    weights = HostWeights(tensors)
    with pytest.raises(RuntimeError), weights.on_device():
        raise RuntimeError
    assert not weights.resident
    assert tensors[0].untyped_storage().nbytes() == 0
    weights.release()  # a second time: nothing happens
    with weights.on_device():
        assert torch.isfinite(tensors[0]).all()
