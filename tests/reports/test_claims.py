"""Verdicts on tables made by hand: holds, does not hold, not enough runs."""

import pytest
from made import recorded, section

from adafrugal.reports import claims
from adafrugal.reports.arms import jobs as jobs_of

BASE = "scale=mini data=embedded"
ARMS = ("adamw", "galore", "badam", "frugal", "frugal_0", "adafrugal")
HOLDS, FAILS, OPEN = "holds", "does not hold", "not enough runs"


@pytest.fixture(scope="module")
def jobs():
    return jobs_of([f"-m experiments={','.join(f'c4_60m/{arm}' for arm in ARMS)} seed=0,1,2 {BASE}"])


@pytest.fixture
def judged(jobs, tmp_path):
    """A function: claim, arm -> losses (or keyword arguments of `recorded`) -> verdict and those of the parts."""

    def make(name, jobs=jobs, **arms):
        for job in jobs:
            for seed, given in enumerate(arms.get(job.name, ())):
                recorded(tmp_path, job.command, seed=seed, **(given if isinstance(given, dict) else {"loss": given}))
        findings = claims.judge(claims.CLAIMS[name], section(jobs, tmp_path))
        return claims.verdict(findings), [finding.verdict for finding in findings]

    return make


def with_loss(**columns):
    """Keyword arguments of `recorded` for each seed, with an invented loss."""
    return [{"loss": 4.5} | dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


F1 = {"frugal": (4.50, 4.60, 4.70), "galore": (4.60, 4.71, 4.79), "badam": (4.9, 5.0, 5.1), "adamw": (4.5, 4.6, 4.7)}
F2 = {"frugal_0": (4.0, 5.0, 6.0), "galore": (4.1, 5.11, 6.1), "badam": (4.2, 5.2, 6.21)}


@pytest.mark.parametrize(("name", "arms", "parts"), [
    ("F1", F1, [HOLDS] * 3),
    ("F1", F1 | {"galore": (4.40, 4.49, 4.61)}, [FAILS, HOLDS, HOLDS]),  # one part that fails is enough
    ("F2", F2, [HOLDS] * 2),  # seeds may differ more than arms, since differences are paired
    ("F2", {"frugal_0": (4.5, 4.6), "galore": (4.6, 4.5), "badam": (5, 5.1)}, [OPEN, HOLDS]),  # around zero
    ("F2", {"frugal_0": (4.5,), "galore": (5.5,)}, [OPEN] * 2),  # one seed, and none
    ("A1", {"adafrugal": (4.58, 4.58), "adamw": (4.5, 4.5), "frugal": (4.4, 4.4)}, [HOLDS, FAILS]),  # 1.9%, 4% above
    ("A2", {"adafrugal": with_loss(state=[(3, 1)]), "frugal": with_loss(state=[(3, 3)]),
            "adamw": with_loss(state=[(4, 4)])}, [HOLDS] * 3),  # bytes are counted: one seed is enough
    ("A2", {arm: with_loss(state=[(3, 3)]) for arm in ("adafrugal", "frugal", "adamw")}, [FAILS] * 3),
    ("A3", {"adafrugal": with_loss(share=[0.02, 0.021]), "frugal": with_loss(share=[0.030, 0.031])}, [HOLDS]),
    ("A3", {"adafrugal": with_loss(share=[0.02, 0.021], evaluation=[1, 1]),  # evaluations count as time
            "frugal": with_loss(share=[0.030, 0.031], evaluation=[0.5, 0.5])}, [FAILS]),
])  # fmt: skip
def test_a_claim_holds_where_all_its_parts_do(judged, name, arms, parts):
    whole = FAILS if FAILS in parts else OPEN if OPEN in parts else HOLDS
    assert judged(name, **arms) == (whole, parts)


@pytest.mark.parametrize(("share", "verdict"), [(0.3, HOLDS), (0.7, FAILS)])
def test_a_longer_interval_saves_time_or_does_not(judged, share, verdict):
    svd = jobs_of([f"-m experiments=c4_130m/frugal,c4_130m/adafrugal_interval optimizer.subspace=svd seed=0,1 {BASE}"])
    fixed, moved = with_loss(share=[0.5, 0.51]), with_loss(share=[share, share + 0.01])
    assert judged("A3-svd", svd, frugal=fixed, adafrugal_interval=moved) == (verdict, [verdict, HOLDS])


@pytest.mark.parametrize(("head", "others", "verdict"), [
    ((4.60, 4.70), (4.51, 4.61), HOLDS),  # 0.1 against 0.01
    ((4.60, 4.70), (4.54, 4.64), HOLDS),  # 0.1 against 0.04
    ((4.60, 4.70), (4.56, 4.66), FAILS),  # 0.1 against 0.06
    ((4.45, 4.55), (4.40, 4.50), FAILS),  # it does not hurt at all
])  # fmt: skip
def test_far_more_is_more_than_twice_and_more_than_nothing(judged, head, others, verdict):
    modules = jobs_of([f"-m experiments=modules/usual,modules/embeddings,modules/norms,modules/head seed=0,1 {BASE}"])
    assert judged("F3", modules, usual=(4.5, 4.6), embeddings=others, norms=others, head=head)[0] == verdict


def test_early_is_the_first_evaluation_and_late_the_last(judged):
    subspaces = jobs_of([f"-m experiments=subspaces/svd,subspaces/random seed=0,1 {BASE}"])
    svd = [{"loss": loss, "early": loss + 0.5} for loss in (4.5, 4.6)]
    random = [{"loss": loss - 0.1, "early": loss + 0.7} for loss in (4.5, 4.61)]
    assert judged("F4", subspaces, svd=svd, random=random) == (HOLDS, [HOLDS, HOLDS])


def test_autonomy_is_against_the_best_of_a_search_on_other_seeds(tmp_path):
    searched = jobs_of([
        f"-m experiments=c4_130m/frugal optimizer.density=0.05,0.25 {BASE}",
        f"-m experiments=c4_130m/frugal optimizer.density=0.25 seed=1,2 {BASE}",
        f"-m experiments=c4_130m/adafrugal seed=0,1,2 {BASE}",
    ])  # fmt: skip
    for job, losses in zip(searched, ((4.9,), (4.0, 4.6, 4.7), (4.51, 4.62, 4.72)), strict=True):
        for seed, loss in enumerate(losses):
            recorded(tmp_path, job.command, loss, seed=seed)
    found = section(searched, tmp_path, claims=["A4"])
    (finding,) = claims.judge(claims.CLAIMS["A4"], found)
    assert "above ρ=0.25, the best of 2 static settings on seed 0, which cost as many runs" in finding.part.text
    assert (finding.found.n, finding.verdict) == (2, HOLDS), "seed 0, on which 4.0 was luck, is left out"
    assert "**A4: holds.** Autonomy" in claims.markdown(found)
