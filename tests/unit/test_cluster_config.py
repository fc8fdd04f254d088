"""``conf/cluster``: shipped machines, and values that no machine has."""

import pytest
import yaml

from nemo_minitron.config.pipeline import ClusterConfig
from nemo_minitron.config.schema import conf_dir
from nemo_minitron.models.speed import peak_tflops

SHIPPED = {"dgx_h100": (8, 80, 989), "dgx_a100": (8, 80, 312), "cpu": (0, 8, 0.19)}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_clusters(name):
    values = yaml.safe_load((conf_dir() / "cluster" / f"{name}.yaml").read_text())
    cluster = ClusterConfig(**values)
    assert (cluster.gpus_per_node, cluster.gpu_memory_gb, cluster.peak_tflops) == SHIPPED[name]
    assert cluster.ranks_per_node == (8 if name.startswith("dgx") else 1)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"gpus_per_node": -1}, r"cluster.gpus_per_node=-1 must not be negative"),
        ({"gpu_memory_gb": 0}, r"cluster.gpu_memory_gb=0 must be above 0"),
        ({"peak_tflops": -1}, r"cluster.peak_tflops=-1 must be above 0"),
        ({"reserved_memory_gb": 80}, r"must lie between 0 and cluster.gpu_memory_gb=80"),
    ],
)
def test_values_that_no_machine_has(keys, says):
    with pytest.raises(ValueError, match=says):
        ClusterConfig(**keys)


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", SHIPPED["dgx_a100"][2]),
        ("NVIDIA H100 80GB HBM3", SHIPPED["dgx_h100"][2]),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB300", 2500),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_the_names_of_cuda(gpu, peak):
    assert peak_tflops(gpu) == peak
