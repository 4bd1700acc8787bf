"""Claims on tables made by hand: what holds, what does not, and what cannot be told."""

import pytest
from made import recorded

from adafrugal.reports import claims, plan, records
from adafrugal.reports.arms import jobs as jobs_of
from adafrugal.reports.plan import Section

BASE = "scale=mini data=embedded"
ARMS = ("adamw", "galore", "badam", "frugal", "frugal_0", "adafrugal")


@pytest.fixture(scope="module")
def jobs():
    return jobs_of([f"-m experiments={','.join(f'c4_60m/{arm}' for arm in ARMS)} seed=0,1,2 {BASE}"])


@pytest.fixture
def judged(jobs, tmp_path):
    """A function: claim, arm -> losses (or keyword arguments of `recorded`) -> verdict and those of the parts."""

    def make(name, jobs=jobs, **arms):
        for job in jobs:
            for seed, given in enumerate(arms.get(job.name.replace(" ", "_"), ())):
                more = given if isinstance(given, dict) else {"loss": given}
                recorded(tmp_path, job.command, seed=seed, **more)
        empty = plan.Page("page", plan.PageFile(), [Section("main", "Main", [], jobs=jobs)])
        (page,) = plan.filled([empty], records.find([tmp_path]))
        findings = claims.judge(claims.CLAIMS[name], page.sections[0])
        return claims.verdict(findings), [finding.verdict for finding in findings]

    return make


def test_what_is_better_in_every_seed_holds(judged):
    losses = {
        "frugal": (4.50, 4.60, 4.70),
        "galore": (4.60, 4.71, 4.79),
        "badam": (4.9, 5.0, 5.1),
        "adamw": (4.5, 4.6, 4.7),
    }
    assert judged("F1", **losses) == ("holds", ["holds", "holds", "holds"])


def test_seeds_may_differ_more_than_arms_since_differences_are_paired(judged):
    found = judged("F2", frugal_0=(4.0, 5.0, 6.0), galore=(4.1, 5.11, 6.1), badam=(4.2, 5.2, 6.21))
    assert found == ("holds", ["holds", "holds"])


def test_one_part_that_does_not_hold_is_enough(judged):
    losses = {
        "frugal": (4.50, 4.60, 4.70),
        "galore": (4.40, 4.49, 4.61),
        "badam": (4.9, 5.0, 5.1),
        "adamw": (4.5, 4.6, 4.7),
    }
    assert judged("F1", **losses) == ("does not hold", ["does not hold", "holds", "holds"])


def test_an_interval_around_zero_tells_nothing(judged):
    assert judged("F2", frugal_0=(4.5, 4.6), galore=(4.6, 4.5), badam=(5, 5.1))[1] == [
        "not enough runs",
        "holds",
    ]


def test_one_seed_is_not_enough_and_none_is_not(judged):
    assert judged("F2", frugal_0=(4.5,), galore=(5.5,)) == ("not enough runs", ["not enough runs"] * 2)


def test_close_is_a_margin(judged):
    within = judged("A1", adafrugal=(4.58, 4.58), adamw=(4.5, 4.5), frugal=(4.4, 4.4))
    assert within[1] == ["holds", "does not hold"]  # 1.9% and 4% above


def test_bytes_are_counted_so_that_one_seed_says_them(judged):
    frees = {"adafrugal": ({"loss": 4.5, "state": (3, 1)},), "frugal": ({"loss": 4.5, "state": (3, 3)},)}
    frees["adamw"] = ({"loss": 4.5, "state": (4, 4)},)
    assert judged("A2", **frees) == ("holds", ["holds", "holds", "holds"])


def test_bytes_that_stay_do_not_hold(judged):
    stays = {"adafrugal": ({"loss": 4.5, "state": (3, 3)},), "frugal": ({"loss": 4.5, "state": (3, 3)},)}
    stays["adamw"] = ({"loss": 4.5, "state": (3, 3)},)
    assert judged("A2", **stays) == ("does not hold", ["does not hold"] * 3)


def test_time_is_a_share_of_the_same_run_and_evaluations_are_part_of_it(judged):
    shares = {"adafrugal": [{"loss": 4.5, "share": s} for s in (0.02, 0.021)],
              "frugal": [{"loss": 4.5, "share": s} for s in (0.030, 0.031)]}  # fmt: skip
    assert judged("A3", **shares)[0] == "holds"


def test_evaluations_that_cost_more_than_the_optimizer_saves_do_not_hold(judged):
    shares = {"adafrugal": [{"loss": 4.5, "share": s, "evaluation": 1.0} for s in (0.02, 0.021)],
              "frugal": [{"loss": 4.5, "share": s, "evaluation": 0.5} for s in (0.030, 0.031)]}  # fmt: skip
    assert judged("A3", **shares)[0] == "does not hold"


@pytest.mark.parametrize(("share", "verdict"), [(0.3, "holds"), (0.7, "does not hold")])
def test_a_longer_interval_saves_time_or_does_not(judged, share, verdict):
    svd = jobs_of([f"-m experiments=c4_130m/frugal,c4_130m/adafrugal_interval optimizer.subspace=svd seed=0,1 {BASE}"])
    fixed = [{"loss": 4.5, "share": 0.5}, {"loss": 4.6, "share": 0.51}]
    moved = [{"loss": 4.5, "share": share}, {"loss": 4.6, "share": share + 0.01}]
    assert judged("A3-svd", svd, frugal=fixed, adafrugal_interval=moved) == (verdict, [verdict, "holds"])


@pytest.mark.parametrize(("head", "others", "verdict"), [
    ((4.60, 4.70), (4.51, 4.61), "holds"),  # 0.1 against 0.01
    ((4.60, 4.70), (4.54, 4.64), "holds"),  # 0.1 against 0.04
    ((4.60, 4.70), (4.56, 4.66), "does not hold"),  # 0.1 against 0.06
    ((4.45, 4.55), (4.40, 4.50), "does not hold"),  # it does not hurt at all
])  # fmt: skip
def test_far_more_is_more_than_twice_and_more_than_nothing(judged, head, others, verdict):
    modules = jobs_of([f"-m experiments=modules/usual,modules/embeddings,modules/norms,modules/head seed=0,1 {BASE}"])
    found = judged("F3", modules, usual=(4.50, 4.60), embeddings=others, norms=others, head=head)
    assert found[0] == verdict


def test_early_is_the_first_evaluation_and_late_the_last(judged):
    subspaces = jobs_of([f"-m experiments=subspaces/svd,subspaces/random seed=0,1 {BASE}"])
    svd = [{"loss": loss, "early": loss + 0.5} for loss in (4.5, 4.6)]
    random = [{"loss": loss - 0.1, "early": loss + 0.7} for loss in (4.5, 4.61)]
    assert judged("F4", subspaces, svd=svd, random=random) == ("holds", ["holds", "holds"])


def test_autonomy_is_against_the_best_that_a_search_found_on_other_seeds(tmp_path):
    searched = jobs_of([
        f"-m experiments=c4_130m/frugal optimizer.density=0.05,0.25 {BASE}",
        f"-m experiments=c4_130m/frugal optimizer.density=0.25 seed=1,2 {BASE}",
        f"-m experiments=c4_130m/adafrugal seed=0,1,2 {BASE}",
    ])  # fmt: skip
    for job, losses in zip(searched, ((4.9,), (4.0, 4.6, 4.7), (4.51, 4.62, 4.72)), strict=True):
        for seed, loss in enumerate(losses):
            recorded(tmp_path, job.command, loss, seed=seed)
    empty = plan.Page("page", plan.PageFile(), [Section("main", "Main", [], claims=["A4"], jobs=searched)])
    (page,) = plan.filled([empty], records.find([tmp_path]))
    (finding,) = claims.judge(claims.CLAIMS["A4"], page.sections[0])
    assert "above ρ=0.25, the best of 2 static settings on seed 0, which cost as many runs" in finding.part.text
    assert (finding.found.n, finding.verdict) == (2, "holds"), "seed 0, on which 4.0 was luck, is left out"
    assert "**A4: holds.** Autonomy" in claims.markdown(page.sections[0])
