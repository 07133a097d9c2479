"""What `internlm3 serve --replicas` refuses before it starts anything."""

import sys

import pytest

from internlm3.runtime.cli.main import main


def test_without_the_extra_the_command_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in [name for name in sys.modules if name.startswith("internlm3.runtime.replicas.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["serve", "/no/such/model", "--replicas", "2"]) == 1
    assert "pip install 'internlm3[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "2-1", "many"])
def test_what_is_no_count_is_bad_usage(capsys, count):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "/no/such/model", "--replicas", count])
    assert stop.value.code == 2
    assert "expected a number of replicas" in capsys.readouterr().err


def test_one_gpu_is_not_for_several_replicas(capsys):
    pytest.importorskip("ray", reason="Ray is not installed here: make test-serving installs it")
    assert main(["serve", "/no/such/model", "--replicas", "2", "--device", "cuda:1"]) == 1
    assert "--device cuda:1: Ray gives each replica a GPU of its own" in capsys.readouterr().err
