"""The step that is tried before a run: it refuses what deltas could not bring back."""

import pytest
import torch
from made_up_rows import data_of
from torch import nn

from mm_piece.data import EncodedDataset, read
from mm_piece.errors import ModelError
from mm_piece.models.base import load_base, tensors
from mm_piece.training.dry_run import dry_run_step

pytestmark = pytest.mark.slow


class Counting(nn.Module):
    """An activation that counts what passes while training, as a batch normalisation does."""

    def __init__(self, persistent):
        super().__init__()
        self.register_buffer("passed", torch.zeros(1), persistent=persistent)

    def forward(self, values):
        if self.training:
            self.passed += 1
        return nn.functional.gelu(values)


@pytest.fixture
def examples(tmp_path):
    (tmp_path / "a.png").write_bytes(data_of("red"))
    row = '{"prompt": "Which?", "answer": "red", "image": "a.png"}'
    (tmp_path / "rows.json").write_text(f"[{row}, {row}]")
    return tmp_path


@pytest.mark.parametrize("persistent", [True, False])
def test_a_model_that_changes_more_than_weights_is_refused(persistent, base, examples):
    model, processor = load_base(base)
    model.model.multi_modal_projector.act = Counting(persistent)
    rows = EncodedDataset(read(str(examples / "rows.json")), processor, examples / "encoded")
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    settings = {"per_device_train_batch_size": 2, "learning_rate": 1.0, "use_cpu": True}

    if persistent:
        with pytest.raises(ModelError, match=r"training changes .*act\.passed, which is no weight"):
            dry_run_step(model, rows, settings)
        assert not model.model.multi_modal_projector.act.passed.any()
    else:  # no checkpoint has it
        dry_run_step(model, rows, settings)
    after = tensors(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
