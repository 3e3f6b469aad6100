"""The playground in a real browser: what it shows, to whom, and what cannot harm it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from fastapi import FastAPI
from playground_fake import MODEL, NASTY, Fake, Running, choice, endless, make_app
from playground_page import (  # noqa: F401 fixtures
    Page,
    chromium_fixture,
    fake_fixture,
    opened,
    page_fixture,
    site_fixture,
)
from playwright.sync_api import expect

# ---- what one sees ----


def test_hard_and_soft_run_side_by_side(page: Page):
    page.run()
    assert [body["cot_mode"] for body in page.fake.requests] == ["hard", "soft"]
    for index in (0, 1):
        expect(page.part(index, "phase")).to_have_text("done")
        expect(page.part(index, "count")).to_have_text("24 steps")
        expect(page.part(index, "reasoning")).to_contain_text("pencils")
        expect(page.part(index, "answer")).to_contain_text("boxed{")
    body = page.fake.requests[1]
    assert body["model"] == MODEL and body["stream"] is True
    assert body["cot"] == {"record": "top", "record_top": 8, "max_think_tokens": 192}
    assert (body["temperature"], body["max_tokens"]) == (0, 448)


def test_columns_show_steps_while_the_server_still_streams(page: Page):
    page.fake.script = endless
    page.page.keyboard.press("Control+Enter")
    for index in (0, 1):
        expect(page.part(index, "phase")).to_have_text("thinking")
        expect(page.column(index).locator(".step")).not_to_have_count(0)
    page.page.keyboard.press("Escape")
    page.settled()


def test_the_cot_block_is_shown_as_reported(page: Page):
    page.run()
    facts = page.facts(1)
    assert facts["Thinking ended"] == "end string found"
    assert facts["Think tokens"] == "24"
    assert facts["Forced, answer"] == "2, 3"
    assert facts["τ, σ"] == "0.5, 0.0413"
    assert facts["Weights"] == "default"
    assert facts["Speed"].endswith("tokens/s") and float(facts["Speed"].split()[0]) > 0
    assert facts["Seed"] in {"1001", "2001"}
    expect(page.part(1, "boxed")).not_to_be_empty()


def test_every_step_shows_its_top_tokens_and_marks_the_one_shown(page: Page):
    page.run()
    page.part(0, "chart").focus()
    page.page.keyboard.press("Home")
    steps = page.column(0).locator(".step[data-index]")
    expect(steps.first).to_be_visible()
    first = page.column(0).locator(".step[data-index='0']")
    expect(first.locator(".cell")).to_have_count(8)
    expect(first.locator(".cell.shown")).to_have_count(1)
    weights = first.locator(".cell").evaluate_all(
        "cells => cells.map(cell => Number(cell.style.getPropertyValue('--w')))"
    )
    assert weights == sorted(weights, reverse=True) and 0 < weights[0] <= 1
    assert page.column(0).locator(".step.sampled").count() > 0
    assert page.column(1).locator(".step.sampled").count() == 0
    assert page.column(1).locator(".step.soft").count() > 0
    expect(page.column(1).locator(".step.forced.end")).to_contain_text("2 forced")


def test_a_drawn_token_outside_the_top_is_still_shown(page: Page):
    async def script(fake: Fake, body: dict[str, Any]):
        step = {"token": " rare", "id": 77, "soft": False, "entropy": 2.0, "top": [[" is", 3, 0.9]]}
        yield choice({"reasoning": " rare"}, cot={"steps": [step]})
        yield choice({"content": "x"}, finish_reason="stop", cot={"think_tokens": 1, "seed": 1})

    page.fake.script = script
    page.run()
    shown = page.column(0).locator(".cell.shown")
    expect(shown).to_have_text("·rare")
    expect(page.part(0, "detailRows").locator(".shown")).to_contain_text("–")


def test_a_blend_is_marked_as_mixture_and_sample(page: Page):
    page.part(1, "mode").select_option("mixed")
    page.run()
    assert page.fake.requests[1]["cot"]["policy"] == "blend"
    assert page.fake.requests[1]["cot"]["policy_params"] == {"weight": 0.5}
    expect(page.column(1).locator(".key.blend")).to_be_visible()


def test_the_entropy_chart_has_a_point_for_every_step(page: Page):
    page.run()
    line = page.column(1).locator(".chart-line").get_attribute("d")
    assert line.count("L") == 23 and line.startswith("M0.5 ")
    mean = page.part(1, "mean").inner_text()
    assert mean.startswith("mean ") and mean.endswith(" nats")
    tops = [page.part(i, "chartTop").inner_text() for i in (0, 1)]
    assert tops[0] == tops[1], "heights must compare across columns"


def test_hovering_over_the_chart_shows_that_step(page: Page):
    page.run()
    box = page.part(1, "chart").bounding_box()
    page.page.mouse.move(box["x"] + 2, box["y"] + 10)
    expect(page.part(1, "detailHead")).to_contain_text("Step 1 ·")
    page.page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 10)
    expect(page.part(1, "detailHead")).to_contain_text("Step 24 ·")


def test_arrow_keys_move_along_the_steps(page: Page):
    page.run()
    page.part(1, "chart").focus()
    page.page.keyboard.press("Home")
    for _ in range(3):
        page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("ArrowLeft")
    expect(page.part(1, "chart")).to_have_attribute("aria-valuenow", "3")
    expect(page.part(1, "detailHead")).to_contain_text("Step 3 ·")
    expect(page.column(1).locator(".step.marked")).to_have_attribute("data-index", "2")
    spoken = page.part(1, "chart").get_attribute("aria-valuetext")
    assert spoken.startswith("Step 3, mixture fed, entropy ") and "%" in spoken
    page.part(1, "strip").focus()
    page.page.keyboard.press("End")
    expect(page.part(1, "chart")).to_have_attribute("aria-valuenow", "24")


def test_forced_text_is_set_apart_from_the_models_own(page: Page):
    page.run()
    expect(page.column(1).locator(".forced-text")).to_have_text("\\boxed{")
    expect(page.part(1, "answer")).to_have_text(re.compile(r"^\\boxed\{\d+\}\.$"))
    inside = page.part(1, "answer").inner_text().removeprefix("\\boxed{").removesuffix("}.")
    expect(page.part(1, "boxed")).to_have_text(inside)


def test_five_hundred_steps_stay_a_small_document(page: Page):
    page.fake.steps = 500
    page.page.locator("[data-field='cot.max_think_tokens']").first.fill("")
    page.run()
    for index in (0, 1):
        expect(page.part(index, "count")).to_have_text("500 steps")
        expect(page.part(index, "chart")).to_have_attribute("aria-valuemax", "500")
        expect(page.column(index).locator(".step[data-index='499']")).to_be_visible()
        assert page.column(index).locator(".step").count() < 40
    page.part(0, "chart").focus()
    for _ in range(50):  # through the whole chain
        page.page.keyboard.press("PageUp")
    expect(page.column(0).locator(".step[data-index='0']")).to_be_visible()
    assert page.column(0).locator(".step").count() < 40
    assert page.column(0).locator(".chart-line").get_attribute("d").count("L") == 499


# ---- untrusted text ----


def test_token_texts_never_become_markup(page: Page):
    page.fake.words = NASTY
    page.fake.steps = len(NASTY)
    page.run()
    assert page.page.title() == "softvllm playground"
    assert page.page.locator(".column script, .column img").count() == 0
    expect(page.part(1, "reasoning")).to_contain_text("<script>document.title='owned'</script>")
    page.part(1, "chart").focus()
    seen = set()
    for key in ["Home"] + ["ArrowRight"] * (len(NASTY) - 1):
        page.page.keyboard.press(key)
        seen.update(page.part(1, "detailRows").locator(".token").all_inner_texts())
    assert "\\u202eright to left" in seen and "↵↵" in seen and "·" in seen and "🙂" in seen
    assert any(text.startswith("#") for text in seen), "an empty text shows the token's id"


def test_the_policy_stops_script_that_got_into_the_document(page: Page):
    ran = page.page.evaluate(
        """() => {
          const script = document.createElement("script");
          try { script.text = "window.owned = 1"; document.body.append(script); } catch {}
          try { document.body.innerHTML += "<b>x</b>"; }
          catch (error) { window.refused = error.name; }
          return [window.owned ?? null, window.refused ?? null];
        }"""
    )
    assert ran == [None, "TypeError"]
    page.console.clear()  # the browser reports both attempts


def test_a_link_of_a_stranger_can_only_fill_known_fields(page: Page):
    state = {
        "v": 1, "shared": {"prompt": "<b>hi</b>", "__proto__": {"x": 1}, "evil": "1", "seed": 5},
        "columns": [{"mode": "soft", "extra": "{}", "policy_params": {"a b": "1"}}] * 20,
    }  # fmt: skip
    raw = json.dumps(state)
    page.page.evaluate(f"location.hash = 's=' + btoa({json.dumps(raw)})")
    expect(page.page.locator("#prompt")).to_have_value("<b>hi</b>")
    expect(page.page.locator(".column")).to_have_count(6)
    page.page.evaluate("location.hash = 's=%%%'")
    expect(page.page.locator(".column")).to_have_count(6)


# ---- anywhere, for anyone ----


def test_the_page_works_below_a_prefix(chromium: Any, fake: Fake):
    outer = FastAPI()
    outer.mount("/some/prefix", make_app(fake))
    with Running(outer) as url:
        for page in opened(chromium, fake, f"{url}/some/prefix"):
            page.page.goto(f"{url}/some/prefix/playground/")  # leads to the page without the slash
            page.run()
            expect(page.part(1, "phase")).to_have_text("done")
            assert [u for u in page.asked if not u.startswith(f"{url}/some/prefix/")] == []
            assert page.console == []


def test_the_whole_page_is_usable_by_keyboard_alone(page: Page):
    page.page.keyboard.press("Tab")
    names = set()
    for _ in range(60):
        names.add(
            page.page.evaluate(
                """() => {
                  const at = document.activeElement;
                  const style = getComputedStyle(at);
                  if (at !== document.body && style.outlineStyle === "none")
                    return "no outline: " + at.outerHTML;
                  return at.dataset.part ?? at.dataset.field ?? at.id ?? at.tagName;
                }"""
            )
        )
        page.page.keyboard.press("Tab")
    assert {"prompt", "run", "add", "share", "mode", "curl", "cot.seed"} <= names
    assert not [name for name in names if name.startswith("no outline")]


@pytest.mark.parametrize("width", [360, 700, 1300])
def test_nothing_spills_over_the_edge(
    chromium: Any, site: tuple[Fake, str], fake: Fake, width: int
):
    fake.words = [*NASTY, *fake.words]
    for page in opened(chromium, fake, site[1], viewport={"width": width, "height": 800}):
        page.part(1, "settings").locator("summary").click()
        page.run()
        overflow = page.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0


def test_every_control_has_a_name(page: Page):
    page.run()
    for index in (0, 1):
        page.part(index, "settings").locator("summary").click()
    nameless = page.page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button, [role=slider]")]
          .filter((node) => node.checkVisibility())
          .filter((node) => !node.labels?.length && !node.getAttribute("aria-label"))
          .filter((node) => !node.textContent.trim())
          .map((node) => node.outerHTML)"""
    )
    assert nameless == []


def test_motion_stops_where_it_is_unwanted(chromium: Any, site: tuple[Fake, str], fake: Fake):
    fake.script = endless
    for motion, expected in (("reduce", "none"), ("no-preference", "pulse")):
        for page in opened(chromium, fake, site[1], reduced_motion=motion):
            page.page.keyboard.press("Control+Enter")
            expect(page.part(0, "phase")).to_have_text("thinking")
            name = page.part(0, "phase").evaluate(
                "n => getComputedStyle(n, '::before').animationName"
            )
            assert name == expected
