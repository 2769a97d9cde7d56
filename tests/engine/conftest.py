"""One Ray for the tests that can share one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from fedsim.engine import ray as engine


@pytest.fixture(scope="package")
def shared_ray() -> Iterator[None]:
    """Four CPUs and two GPUs that do not exist."""
    if ray.is_initialized():
        ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # Ray counts the GPUs that it names
        ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
        patch.setattr(engine, "_torch_is_used", lambda: False)  # an import less in every worker
        yield
    ray.shutdown()
