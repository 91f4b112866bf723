"""Which rank the others wait for, and what is said of nodes."""

from __future__ import annotations

import pytest

from layerplan.train import metrics
from layerplan.train.peers import PeerFacts, gather_facts, summarise_peers


def facts(node: int, waited_s: float, data_s: float = 0.0, memory: float = 1.0) -> PeerFacts:
    return PeerFacts(node, waited_s, data_s, memory, 50.0 + node, 1000.0, 25.0)


def test_the_slowest_rank_is_the_one_that_waits_least():
    peers = [facts(0, 4.0), facts(0, 0.5, data_s=3.0, memory=2.0), facts(1, 3.0)]
    values = summarise_peers(peers, steps=7, seconds=12.0)
    assert values[metrics.SLOWEST_RANK] == 1
    assert values[metrics.BEHIND_S] == pytest.approx(0.5)  # 3.5 s in 7 steps
    assert values[metrics.DATA_WAIT_SHARE] == pytest.approx(0.25)
    assert values[metrics.PEAK_MEMORY_GIB] == 2.0
    assert values["system/node_0/cpu_utilization_percentage"] == 50.0
    assert values["system/node_1/cpu_utilization_percentage"] == 51.0


def test_one_rank_has_nobody_to_be_slower_than():
    assert gather_facts(facts(0, 0.0), 1, None) == [facts(0, 0.0)]
    assert metrics.SLOWEST_RANK not in summarise_peers([facts(0, 0.0)], steps=1, seconds=1.0)
