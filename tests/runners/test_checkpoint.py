import pytest
import torch

from runners import checkpoint, trainer
from runners.config import ConfigError
from runners.record import read_summary

CPU = torch.device("cpu")


def saved(folder):
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def test_the_last_two_are_kept_and_the_newest_is_read(tmp_path):
    for step in range(1, 13):
        checkpoint.save(tmp_path, {"step": step, "weights": torch.full((100,), float(step))})
    assert [path.name.split("-")[1] for path in saved(tmp_path)] == ["11", "12"]
    state = checkpoint.load(tmp_path, CPU)
    assert state["step"] == 12
    assert torch.equal(state["weights"], torch.full((100,), 12.0))


@pytest.mark.parametrize("damage", ["bit", "tail", "empty"])
def test_a_damaged_one_is_named_and_the_one_before_it_used(tmp_path, capsys, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, {"step": step, "weights": torch.full((100,), float(step))})
    latest = saved(tmp_path)[-1]
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1  # within the weights, where neither zip nor pickle would see it
    latest.write_bytes({"bit": content, "tail": content[:-200], "empty": b""}[damage])
    assert checkpoint.load(tmp_path, CPU)["step"] == 1
    assert f"warning: {latest} is damaged; going on from the one before it" in capsys.readouterr().err
    checkpoint.save(tmp_path, {"step": 2})
    assert checkpoint.load(tmp_path, CPU)["step"] == 2
    assert len(saved(tmp_path)) == 2


def test_they_carry_no_code(tmp_path):
    checkpoint.save(tmp_path, {"step": 1, "code": print})
    with pytest.raises(ConfigError, match=r"checkpoint-1-.*\.pt cannot be read .*remove it to begin from the start"):
        checkpoint.load(tmp_path, CPU)


def test_one_of_another_config_is_refused(train, monkeypatch):
    run = ("task=cnn_digits", "optimizer=sgdm", "budget.epochs=1")
    folder = train(*run)
    (folder / "summary.json").unlink()
    checkpoint.save(folder, {"run": "0123456789ab"})
    with pytest.raises(ConfigError, match=r"are of another config \(run 0123456789ab\); remove them"):
        train(*run)
    assert not read_summary(folder), "a refusal changes nothing"


def test_their_share_of_the_time_is_bounded(train, monkeypatch):
    """However slow a checkpoint is, the next one waits until they take at most 2 % of the time."""
    waits = []
    seconds = iter(range(0, 10**9, 1))  # a clock on which everything takes long
    monkeypatch.setattr(trainer.time, "monotonic", lambda: float(next(seconds)))
    save = trainer.Trainer._save_checkpoint

    def timed(self):
        save(self)
        waits.append(self.next_checkpoint - trainer.time.monotonic())

    monkeypatch.setattr(trainer.Trainer, "_save_checkpoint", timed)
    train("task=cnn_digits", "optimizer=sgdm", "budget.epochs=20")
    assert waits
    assert all(wait >= 49 for wait in waits)  # the save itself took one or more ticks
