"""metrics.jsonl, and the services that are logged to as well."""
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest

from common.files import UserError
from common.metrics_log import MetricsLog, check_services, open_services, read_log


def test_a_resumed_log_is_cut_back_to_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1}\n{"step": 3}\n{"st')
    MetricsLog(tmp_path, 2).write(step=3, loss=1)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 2, "eval_loss": 1}\n' \
                               '{"step": 3, "loss": 1}\n'
    assert read_log(path)[3:] == [{"step": 2, "eval_loss": 1}, {"step": 3, "loss": 1}]
    path.write_text('{"step": 1}\n{"step": 2}')  # without its newline
    MetricsLog(tmp_path, 2).write(step=3)
    assert [line["step"] for line in read_log(path)] == [1, 2, 3]
    MetricsLog(tmp_path)
    assert path.read_text() == ""
    assert read_log(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(("content", "last"), [('{"step": 1}\n{"st\n{"step": 3}\n', 1), (None, 0), ("[1]\n", 0)])
def test_lost_entries_of_a_resumed_log_are_told(tmp_path, capsys, content, last):
    path = tmp_path / "metrics.jsonl"
    if content:
        path.write_text(content)
    MetricsLog(tmp_path, 3).write(step=4)
    assert capsys.readouterr().out == f"{path} is damaged or incomplete: of 3 earlier steps those after " \
                                      f"{last} are lost\n"
    assert [line["step"] for line in read_log(path)] == [1] * last + [4]
    path.write_text('{"step": 3}\n')
    MetricsLog(tmp_path, 3)
    assert capsys.readouterr().out == ""


def test_services(tmp_path, monkeypatch):
    tensorboard, wandb = MagicMock(), MagicMock()
    for name, module in (("tensorboard", tensorboard), ("torch.utils.tensorboard", tensorboard), ("wandb", wandb)):
        monkeypatch.setitem(sys.modules, name, module)
    cfg = SimpleNamespace(tensorboard=True, wandb="project", out="runs/m1")
    record = {"settings": {"seed": 1}, "id": "0123456789abcdef"}
    check_services(cfg.tensorboard, cfg.wandb)
    log = MetricsLog(tmp_path, services=open_services(cfg, tmp_path, record))
    log.write(step=4, loss=0.5, grad_norm=None)
    log.close()
    tensorboard.SummaryWriter.assert_called_once_with(tmp_path / "tensorboard")
    writer = tensorboard.SummaryWriter.return_value
    assert writer.mock_calls == [call.add_scalar("step", 4, 4), call.add_scalar("loss", 0.5, 4), call.close()]
    wandb.init.assert_called_once_with(project="project", name="runs/m1", config={"seed": 1}, dir=tmp_path,
                                       id="runs-m1-0123456789ab", resume="allow")
    assert wandb.init.return_value.mock_calls == [call.log({"step": 4, "loss": 0.5, "grad_norm": None}, step=4),
                                                  call.finish()]


def test_other_ranks_and_other_settings_log_to_no_service(tmp_path):
    assert open_services(SimpleNamespace(tensorboard=False, wandb=None), tmp_path, {}) == []
    MetricsLog(None).write(step=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("service", ["tensorboard", "wandb"])
def test_a_service_that_is_not_installed(monkeypatch, service):
    monkeypatch.setitem(sys.modules, service, None)
    with pytest.raises(UserError, match=f"--{service} needs the package {service}, which is not installed"):
        check_services(service == "tensorboard", "project" if service == "wandb" else None)
