"""Which parameters go to Muon and which to AdamW, with which settings."""

from torch import nn

from optimizers.muon import muon


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def parts(groups, **settings):
    return {group["use_muon"]: group for group in muon(groups, **settings).param_groups}


def test_matrices_go_to_muon_and_all_others_to_adamw_however_a_group_gives_them():
    net = model()
    for groups in (net.parameters(), [{"params": net.parameters()}], [{"params": list(net.parameters())}]):
        found = parts(groups)
        assert [p.dim() for p in found[True]["params"]] == [2, 2]
        assert [p.dim() for p in found[False]["params"]] == [1, 1, 1, 1]


def test_a_groups_rate_is_muons_and_adamw_keeps_its_own():
    found = parts([{"params": model().parameters(), "lr": 0.5}], lr=0.02, adamw_lr=0.001)
    assert found[True]["lr"] == 0.5 and found[False]["lr"] == 0.001
