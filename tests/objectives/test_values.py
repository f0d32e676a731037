"""Objectives as values: the same losses as the functions, held, compared, stored, changed and checked before any batch."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
import pydoc
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tests.objectives import ragged
from tests.objectives.ragged import CASES, Case
from vcpo_kernels import objectives
from vcpo_kernels.objectives import OBJECTIVES, TokenBatch, TokenObjective, TokenTerms

METHODS: dict[str, type[TokenObjective]] = {type(e.value).name: type(e.value) for e in OBJECTIVES.values()}
# Hyperparameters that are not the defaults, for every method.
SET = {
    **{OBJECTIVES[c.name].function.__name__: c.knobs for c in CASES if set(c.knobs) - {"aggregation", "max_tokens"}},
    "reinforce": {"aggregation": "token-mean"},
    "vespo": {"power_positive": 1.0},
    "m2po": {"threshold": 0.1, "trust_region_only": False},
}


def same(a: objectives.ObjectiveOutput, b: objectives.ObjectiveOutput) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("loss", "coefficients", "ess_moments"))


def test_every_method_is_here() -> None:
    assert len(METHODS) == 17
    assert set(SET) == set(METHODS)
    assert {c.__name__ for c in METHODS.values()} < set(objectives.__all__)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{'-'.join(c.knobs) or 'defaults'}")
def test_a_value_gives_what_the_function_gives(case: Case) -> None:
    batch, entry = ragged.make(), OBJECTIVES[case.name]
    own = {key: value for key, value in case.knobs.items() if key != "max_tokens"}
    terms: dict[str, Any] = {"max_tokens": 8.0, "reference_logp": batch.reference, "kl_coefficient": 0.1}
    if case.proximal:
        terms["proximal_logp"] = batch.proximal
    arguments = (batch.stats(), batch.mu, batch.advantages, batch.segments)
    held = dataclasses.replace(entry.value, **own)
    out = held(*arguments, **terms)
    assert same(out, entry.function(*arguments, **{**entry.hyperparameters, **own}, **terms))
    assert same(out, entry(*arguments, **own, **terms))
    assert out.metrics.keys() == entry(*arguments, **own, **terms).metrics.keys()


@pytest.mark.parametrize("name", METHODS)
def test_values_are_values(name: str) -> None:
    method = METHODS[name]
    default, held = method(), method(**SET[name])
    assert default == method() != held == method(**SET[name])
    assert hash(held) == hash(method(**SET[name]))
    assert pickle.loads(pickle.dumps(held)) == copy.deepcopy(held) == held
    assert dataclasses.replace(default, **SET[name]) == held
    assert eval(repr(held), {method.__name__: method}) == held
    for key, value in SET[name].items():
        assert f"{key}={value!r}" in repr(held)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(held, key, value)


def test_methods_with_the_same_hyperparameters_differ() -> None:
    assert objectives.TokenTruncatedIS(max_weight=2.0) != objectives.TokenMaskedIS(max_weight=2.0)
    assert objectives.GSPO() != objectives.GSPOToken()


def test_numbers_become_pythons() -> None:
    held = objectives.PPOClip(clip_low=np.float32(0.25), clip_high=np.int64(1), dual_clip=np.float64(3.0))
    assert repr(held) == "PPOClip(aggregation='seq-mean-token-mean', clip_low=0.25, clip_high=1.0, dual_clip=3.0)"
    assert objectives.TOPR(positive_range=[1, 2]) == objectives.TOPR(positive_range=(1.0, 2.0))
    assert objectives.M2PO(trust_region_only=np.bool_(False)).trust_region_only is False
    assert {objectives.CISPO(max_ratio=np.float32(4.0)), objectives.CISPO(max_ratio=4)} == {
        objectives.CISPO(max_ratio=4.0)
    }


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        ("CISPO", {"max_ratio": -1.0}, ValueError, r"^cispo: max_ratio must be finite and > 0, got -1.0"),
        ("PPOClip", {"dual_clip": 1.2}, ValueError, r"^ppo_clip: dual_clip must be > 1 \+ clip_high = 1.2, got 1.2"),
        ("OPSM", {"clip_low": math.nan}, ValueError, r"^opsm: clip_low must be finite and >= 0, got nan"),
        ("GSPOToken", {"clip_high": "x"}, TypeError, r"^gspo_token: clip_high must be a number, got 'x'"),
        ("SequenceMaskedIS", {"min_weight": 9.0}, ValueError, r"^sequence_masked_is: min_weight must be <= max_weight"),
        ("TOPR", {"positive_range": 1.0}, TypeError, r"^topr: positive_range must be a pair"),
        ("SAPO", {"aggregation": "mean"}, ValueError, r"^sapo: aggregation must be one of 'seq-mean-token-mean'"),
        ("Reinforce", {"clip_low": 0.1}, TypeError, r"unexpected keyword argument 'clip_low'"),
    ],
)
def test_hyperparameters_are_checked_as_a_value_is_made(
    method: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(objectives, method)(**arguments)
    if "unexpected" not in message:
        with pytest.raises(error, match=message):
            dataclasses.replace(getattr(objectives, method)(), **arguments)


def test_a_call_takes_terms_alone() -> None:
    batch = ragged.make()
    arguments = (batch.stats(), batch.mu, batch.advantages, batch.segments)
    with pytest.raises(TypeError, match=r"cispo: max_ratio is a hyperparameter, .*replace\(objective, max_ratio=...\)"):
        objectives.CISPO()(*arguments, max_ratio=4.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"cispo: unknown argument 'epsilon'. Beside the method's own it takes num_seq"):
        objectives.CISPO()(*arguments, epsilon=4.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"vespo: unknown argument 'proximal_logp'"):
        objectives.VESPO()(*arguments, proximal_logp=batch.proximal)
    with pytest.raises(TypeError, match=r"icepop: unknown argument 'correction'"):
        objectives.IcePop()(*arguments, correction=objectives.Correction())


@pytest.mark.parametrize("name", METHODS)
def test_functions_name_their_arguments(name: str) -> None:
    """What help() and editors show: the method's hyperparameters with types and defaults, then what all methods take."""
    function, method = getattr(objectives, name), METHODS[name]
    assert function.__name__ == function.__qualname__ == name
    assert pickle.loads(pickle.dumps(function)) is function
    parameters = inspect.signature(function).parameters
    own = [f for f in dataclasses.fields(method) if f.name != "aggregation"]
    batch, terms = ["stats", "behavior_logp", "advantages", "segments"], list(objectives.CommonTerms.__annotations__)
    assert list(parameters) == [*batch, *(f.name for f in own), "aggregation", *method.proximal_terms, *terms]
    for key, value in dataclasses.asdict(method()).items():
        assert parameters[key].default == value
        assert parameters[key].kind is inspect.Parameter.KEYWORD_ONLY
    text = pydoc.plain(pydoc.render_doc(function))
    assert inspect.getdoc(method).splitlines()[0] in text
    assert all(f"{f.name}: {f.type} = {f.default!r}" in text for f in own)
    for part in ("kl_coefficient: float = 0.0", "Args:", "Returns:", "Raises:", "behavior_logp: log mu"):
        assert part in text


def test_entries_hold_values() -> None:
    entry = OBJECTIVES["dapo"]
    assert entry.value == objectives.PPOClip(clip_high=0.28, aggregation="token-mean")
    assert entry.hyperparameters == {"clip_high": 0.28, "aggregation": "token-mean"}
    assert entry.function is objectives.ppo_clip
    assert OBJECTIVES["cispo"].hyperparameters == {}


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"'gpro' is none of reinforce, rloo, .*grpo"):
        OBJECTIVES["gpro"]
    with pytest.raises(KeyError, match="'std' is none of mean, mean_std"):
        objectives.ADVANTAGES["std"]
    assert "gpro" not in OBJECTIVES
    assert OBJECTIVES.get("gpro") is None


def test_old_names_warn() -> None:
    with pytest.warns(DeprecationWarning, match="knobs is called hyperparameters"):
        assert OBJECTIVES["dapo"].knobs == OBJECTIVES["dapo"].hyperparameters

    def rule(tokens: TokenBatch) -> TokenTerms:
        with pytest.warns(DeprecationWarning, match=r"TokenBatch.live is called valid"):
            assert torch.equal(tokens.live, tokens.valid)
        return TokenTerms(tokens.advantages)

    batch = ragged.make()
    objectives.objective_from_coefficients("mine", rule, batch.stats(), batch.mu, batch.advantages, batch.segments)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(TokenObjective):
    """A log pi, times a factor."""

    proximal_terms: ClassVar[tuple[str, ...]] = ()

    factor: float = 1.0

    def rule(self, tokens: TokenBatch) -> TokenTerms:
        return TokenTerms(self.factor * tokens.advantages, uses_ratio=False)


def test_a_method_of_ones_own() -> None:
    batch = ragged.make()
    arguments = (batch.stats(), batch.mu, batch.advantages, batch.segments)
    out = Scaled(factor=2.0)(*arguments)
    torch.testing.assert_close(out.coefficients, 2 * objectives.reinforce(*arguments).coefficients)
    assert pickle.loads(pickle.dumps(Scaled(factor=2.0))) == Scaled(factor=2.0)
    entry = objectives.Objective("scaled", Scaled(factor=2.0), "here")
    assert torch.equal(entry(*arguments).loss, out.loss)
    assert torch.equal(entry.function(*arguments, factor=2.0).loss, out.loss)
    with pytest.raises(ValueError, match=r"^Scaled: aggregation must be one of"):
        Scaled(aggregation="mean")
    with pytest.raises(TypeError, match=r"^Scaled: unknown argument 'correction'"):
        Scaled()(*arguments, correction=objectives.Correction())
    with pytest.raises(TypeError, match="abstract"):
        TokenObjective()  # type: ignore[abstract]
