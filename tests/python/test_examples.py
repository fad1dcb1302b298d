"""The examples that are quick enough run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_train_and_convert_to_one_model():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--fsdp", "--epochs=0", "--qat-epochs=1", "--images=128"]
    result = subprocess.run(
        [*command, ROOT / "examples" / "qat_ddp.py", *options],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "2 ranks hold the same INT8 model" in result.stdout


def test_a_network_is_deployed_and_agrees_with_its_file(tmp_path):
    options = ["--models=resnet18", "--targets=torchscript,plan", "--epochs=0", "--output"]
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / "deploy_everywhere.py", *options, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "deploy_everywhere.json").read_text())["rows"]
    found = {row["target"]: row["agreement"] for row in rows}
    assert found.keys() == {"PyTorch FP32", "PyTorch INT8", "torchscript", "plan"}
    assert found["torchscript"] == found["plan"] == 1.0
