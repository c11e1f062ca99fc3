"""Where models are put, with and without an accelerator and a launcher."""

import pytest
import torch

from llamba.base import devices


@pytest.fixture(params=[False, True], ids=["no accelerator", "accelerator"])
def there(request, monkeypatch) -> bool:
    """A build of torch for CUDA, which names it whether or not there is one."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: request.param)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2 if request.param else 0)
    for name in ("ACCELERATE_USE_CPU", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return request.param


def test_auto_is_the_accelerator_only_where_there_is_one(there: bool) -> None:
    assert devices.meant("auto") == ("cuda" if there else "cpu")
    assert devices.meant("cpu") == "cpu"
    if there:
        assert devices.meant("cuda:1") == "cuda:1"
    else:
        with pytest.raises(ValueError, match="--device cuda:1 is not here: this machine has no accelerator"):
            devices.meant("cuda:1")
    with pytest.raises(ValueError, match="--device cuda:2 is not here"):
        devices.meant("cuda:2")


def test_a_process_has_the_device_of_its_rank_unless_the_launcher_says_cpu(there: bool, monkeypatch) -> None:
    assert devices.own_device() == torch.device("cuda:0" if there else "cpu") and devices.processes() == 1
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert devices.own_device() == torch.device("cuda:3" if there else "cpu") and devices.processes() == 8
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert devices.on_cpu() and devices.own_device() == torch.device("cpu")
