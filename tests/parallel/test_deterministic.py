"""--deterministic inside a rank."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.config.run import DETERMINISTIC_ENVIRONMENT
from megatron_vlm.parallel.deterministic import use_deterministic_algorithms


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.use_deterministic_algorithms(False)


def test_on_a_gpu_the_environment_has_to_be_there_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DETERMINISTIC_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"needs CUBLAS_WORKSPACE_CONFIG=:4096:8 .*scripts/train/run\.py"):
        use_deterministic_algorithms("cuda")
    assert not torch.are_deterministic_algorithms_enabled()
    use_deterministic_algorithms("cpu")
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    for name, value in DETERMINISTIC_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    use_deterministic_algorithms("cuda")
    assert torch.are_deterministic_algorithms_enabled()
