"""Plans as data: out and back in, edited by hand, and every slip of the hand said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewardprop_fast.errors import ConfigError
from rewardprop_fast.memory.kinds import KINDS
from rewardprop_fast.memory.plan import Plan, Policy, check_rules, policy_for

RULES = st.dictionaries(
    st.sampled_from([*KINDS, "unet.*", "unet.mid_block.*", "vae.decoder.up_blocks.[01].*", "é"]),
    st.sampled_from(Policy),
    max_size=4,
)
PLANS = st.builds(
    Plan,
    st.lists(RULES, min_size=1, max_size=4).map(tuple),
    RULES,
    RULES,
    st.sampled_from(["all", "phases"]),
    st.none() | st.integers(1, 2**40),
    st.dictionaries(st.text(max_size=3), st.integers()),
    st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False)),
)


@given(PLANS)
def test_json_there_and_back(plan: Plan) -> None:
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    for a, b in zip(plan.steps, again.steps, strict=True):
        assert list(a) == list(b)  # their order says which counts


def test_steps_that_differ_in_the_order_of_their_rules_stay_apart() -> None:
    a = {"resnet": Policy.KEEP, "unet.*": Policy.RECOMPUTE}
    b = dict(reversed(a.items()))
    again = Plan.from_json(Plan((a, b, b)).to_json())
    found = [policy_for(rules, "unet.r", "resnet") for rules in again.steps]
    assert found == [Policy.RECOMPUTE, Policy.KEEP, Policy.KEEP]


def test_what_is_written() -> None:
    recompute = {"transformer block": Policy.RECOMPUTE}
    plan = Plan((recompute, recompute, {}), {"resnet": Policy.KEEP}, budget_bytes=7)
    assert json.loads(plan.to_json()) == {
        "format": "rewardprop-plan",
        "version": 1,
        "for": {},
        "budget_bytes": 7,
        "steps": [
            {"count": 2, "rules": {"transformer block": "recompute"}},
            {"count": 1, "rules": {}},
        ],
        "decode": {"resnet": "keep"},
        "reward": {},
        "residency": "all",
        "prediction": {},
    }
    assert plan.to_json().endswith("}\n")


def test_written_by_hand_and_little_of_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"format": "rewardprop-plan", "version": 1}')
    assert Plan.load(path) == Plan()
    path.write_text(
        '{"format": "rewardprop-plan", "version": 1, "steps": [{"rules": {"step": "offload"}}, {}]}'
    )
    assert Plan.load(str(path)) == Plan(({"step": Policy.OFFLOAD}, {}))


def document(**changes: Any) -> str:
    return json.dumps({"format": "rewardprop-plan", "version": 1, **changes})


POLICIES = "keep, recompute, offload, recompute+offload, quantise"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "P is no JSON: Expecting property name"),
        ("[" * 100_000, "P is no JSON: "),
        ("[]", 'P is not a plan: it should hold "format": "rewardprop-plan" and "version": 1'),
        ('"plan"', "P is not a plan"),
        (document(format="plan"), "P is not a plan"),
        (document(version=2), "P is not a plan"),
        (
            document(stepz=[]),
            "P has the key 'stepz'; allowed are budget_bytes, decode, for, format",
        ),
        (document(steps=[]), 'P: "steps" must be a list of {"count": ..., "rules": ...}.'),
        (document(steps={}), 'P: "steps" must be a list'),
        (document(steps=None), 'P: "steps" must be a list'),
        (document(steps=[3]), 'P: a step is {"count": 1 to 1000, "rules": {...}}, not 3.'),
        (document(steps=[{"count": 0}]), "P: a step is"),
        (document(steps=[{"count": True}]), "P: a step is"),
        (document(steps=[{"count": 10**12}]), "P: a step is"),
        (document(steps=[{"counts": 1}]), "P: a step is"),
        (document(steps=[{"rules": []}]), "P, steps: rules are a mapping of segments to policies"),
        (document(steps=[{"rules": {"resnet": "kept"}}]), f"'kept'; allowed: {POLICIES}."),
        (document(decode={"resnet": None}), "P, decode: 'resnet' is None; allowed: keep"),
        (document(reward={"resnet": ["keep"]}), "P, reward: 'resnet' is ['keep']; allowed: keep"),
        (
            document(decode={"res net": "keep"}),
            "P, decode: there is no kind 'res net'; there are step",
        ),
        (document(residency="some"), "P: residency is 'some'; allowed: all, phases."),
        (document(residency=["all"]), "P: residency is ['all']"),
        (
            document(budget_bytes=0),
            "P: budget_bytes is 0; allowed: a whole number from 1, or null.",
        ),
        (document(budget_bytes=True), "P: budget_bytes is True"),
        (document(budget_bytes="24GiB"), "P: budget_bytes is '24GiB'"),
        (document(prediction=[]), "P: 'prediction' is []; allowed: a mapping."),
        (document(**{"for": None}), "P: 'for' is None; allowed: a mapping."),
        (
            '{"format": "rewardprop-plan", "version": 1, "decode": {"a": "keep", "a": "offload"}}',
            "P is no JSON: the key 'a' is there twice.",
        ),
    ],
)
def test_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Plan.from_json(text, "P")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "wrong").write_text("{}")
    for name, message in [
        ("absent", "cannot be read: [Errno 2]"),
        ("", "cannot be read"),
        ("binary", "cannot be read: 'utf-8'"),
        ("wrong", "is not a plan"),
    ]:
        with pytest.raises(ConfigError) as error:
            Plan.load(tmp_path / name)
        assert message in str(error.value)
        assert str(tmp_path / name) in str(error.value)


def test_policies_may_be_given_as_words_and_are_checked() -> None:
    words: Any = {"resnet": "recompute"}
    plan = Plan((words,), decode=words)
    assert plan.steps[0]["resnet"] is plan.decode["resnet"] is Policy.RECOMPUTE
    words["resnet"] = "offload"
    assert not plan.offloads  # it has taken a copy
    with pytest.raises(ConfigError, match="The plan, reward: 'resnet' is 'no'"):
        Plan(reward={"resnet": "no"})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="one gradient step at least"):
        Plan(())


def test_the_last_step_holds_for_those_behind_it() -> None:
    plan = Plan(({"step": Policy.RECOMPUTE}, {}))
    assert [plan.rules_of_step(i) for i in range(4)] == [{"step": Policy.RECOMPUTE}, {}, {}, {}]


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (Plan(), False),
        (Plan(({"step": Policy.RECOMPUTE}, {"step": Policy.QUANTISE})), False),
        (Plan(({}, {"step": Policy.OFFLOAD})), True),
        (Plan(decode={"resnet": Policy.RECOMPUTE_OFFLOAD}), True),
        (Plan(reward={"reward block": Policy.OFFLOAD}), True),
    ],
)
def test_whether_it_offloads(plan: Plan, expected: bool) -> None:
    assert plan.offloads is expected


def test_the_last_rule_that_fits_counts() -> None:
    rules = {"resnet": Policy.RECOMPUTE, "unet.mid_block.*": Policy.KEEP, "*.r1": Policy.OFFLOAD}
    name = "unet.mid_block.r"
    assert policy_for(rules, "unet.down.r0", "resnet") is Policy.RECOMPUTE
    assert policy_for(rules, f"{name}0", "resnet") is Policy.KEEP
    assert policy_for(rules, f"{name}1", "resnet") is Policy.OFFLOAD
    assert policy_for(rules, "unet.r1", "attention") is Policy.OFFLOAD
    assert policy_for(rules, "UNET.mid_block.r0", "attention") is Policy.KEEP  # the default
    assert policy_for({}, "unet", "step") is Policy.KEEP
    assert policy_for(dict(reversed(rules.items())), f"{name}0", "resnet") is Policy.RECOMPUTE


def test_a_rule_that_names_nothing_is_refused_with_what_there_is() -> None:
    names, kinds = ["unet", "unet.mid_block.resnets.0"], ["step", "resnet", "resnet"]
    check_rules({"step": Policy.KEEP, "*.resnets.?": Policy.KEEP}, names, kinds, "Rules")
    with pytest.raises(ConfigError) as error:
        check_rules({"resnet": Policy.KEEP, "attention": Policy.KEEP}, names, kinds, "Rules")
    assert str(error.value) == (
        "Rules has a rule for 'attention', which names no segment. Allowed are the kinds there are "
        "here (step, resnet) and patterns of names, such as 'unet.mid_block.resnets.*'."
    )
    with pytest.raises(ConfigError, match=r"\(none\).*such as 'unet.mid_block.\*'"):
        check_rules({"resnet": Policy.KEEP}, [], [], "Rules")


def test_what_a_file_foretells_is_for_people_whatever_its_names() -> None:
    """Files of before have other names there; they are read, and obeyed."""
    plan = Plan(({"resnet": Policy.RECOMPUTE},), budget_bytes=2**30)
    data = json.loads(plan.to_json())
    data["for"], data["prediction"] = {"lora_rank": 4}, {"peak_by_phase": {"decode": 7}}
    read = Plan.from_json(json.dumps(data))
    assert (read.steps, read.budget_bytes) == (plan.steps, plan.budget_bytes)
    assert read.prediction == {"peak_by_phase": {"decode": 7}}
