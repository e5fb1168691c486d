"""Side files of a checkpoint: damaged values are refused."""
import pytest
import torch
from safetensors.torch import save_file

from common.files import UserError
from model.parameter_files import ParameterFiles


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    save_file({"mean/weight@0": torch.tensor([1.0, 2.0]), "mean/weight@2": torch.tensor([3.0, value])},
              tmp_path / "file.safetensors")
    files, into = ParameterFiles([tmp_path / "file.safetensors"], "the posterior"), torch.empty(3)
    files.read("mean", "weight", 0, into)
    assert into.tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="the posterior: mean of weight holds values that are not finite"):
        files.read("mean", "weight", 1, into)


@pytest.mark.parametrize("stored", [torch.tensor(1.0), torch.ones(2, 2), torch.ones(2, dtype=torch.int64)])
def test_tensors_of_another_kind_are_refused(tmp_path, stored):
    save_file({"mean/weight@0": stored}, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=r"mean/weight@0 is damaged: expected a list of fp32 values"):
        ParameterFiles([tmp_path / "file.safetensors"], "the posterior")
