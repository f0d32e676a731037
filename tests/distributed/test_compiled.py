"""Over ranks under torch.compile(fullgraph=True): the numbers of the calls as they are, collectives in the graphs."""

from __future__ import annotations

from typing import Any

import pytest

from tests import ranks
from tests.distributed import compiled

SAME = 1e-6  # forwards have the same bits; a GEMM's sums may not, where a graph's memory is aligned otherwise


@pytest.fixture(scope="module")
def of_two() -> list[dict[str, Any]]:
    return ranks.run(compiled.on_rank, 2)


def test_shards_of_a_vocabulary(of_two: list[dict[str, Any]]) -> None:
    """One graph for all batches and temperatures, on both ranks the same collectives: a gather a call, d hidden of a head."""
    for result in of_two:
        shards = result["shards"]
        assert max(shards["differences"]) <= SAME
        assert shards["forward"] == [["all_gather_into_tensor"] * 3]
        assert shards["backward"] == [["all_reduce"] * 2]


def test_data_and_sequence_ranks(of_two: list[dict[str, Any]]) -> None:
    for result in of_two:
        steps = result["steps"]
        assert max(steps["differences"]) <= SAME
        (forward,), (backward,) = steps["forward"], steps["backward"]
        assert forward == of_two[0]["steps"]["forward"][0]
        assert forward.count("all_gather_into_tensor") == 3  # of vcpo_loss, of ESS, of the baseline
        assert set(forward) == {"all_gather_into_tensor", "all_reduce"}
        assert backward == []


def test_uneven_ranks_are_refused(of_two: list[dict[str, Any]]) -> None:
    """Their numbers are read on the host: an error that says so where the graph may not break."""
    for result in of_two:
        assert "Ranks(uneven=True) reads each rank's number of sequences on the host" in result["uneven"]


@pytest.fixture(scope="module")
def everything() -> list[dict[str, Any]]:
    return ranks.run(compiled.everything_on_rank, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["head", "dtensors", "layout", "objective", "uneven"])
def test_graphs_run_as_they_are(everything: list[dict[str, Any]], kind: str) -> None:
    for result in everything:
        of_kind = {name: max(apart) for name, apart in result.items() if name.startswith(kind)}
        assert of_kind
        assert {name: apart for name, apart in of_kind.items() if not apart <= SAME} == {}


@pytest.mark.slow
def test_through_inductor(everything: list[dict[str, Any]]) -> None:
    for result in everything:
        found = {name: max(apart) for name, apart in result.items() if name.startswith("inductor")}
        assert found
        assert {name: apart for name, apart in found.items() if not apart <= 5e-6} == {}


@pytest.mark.slow
def test_four_ranks() -> None:
    for result in ranks.run(compiled.of_four_on_rank, 4):
        assert {name: max(apart) for name, apart in result.items() if not max(apart) <= SAME} == {}
