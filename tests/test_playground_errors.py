"""What the playground says when something goes wrong, in a real browser."""

from __future__ import annotations

from typing import Any

import pytest
from playground_fake import INFO, Fake, Running, chain, choice, error, make_app
from playground_page import (  # noqa: F401 fixtures
    Page,
    chromium_fixture,
    fake_fixture,
    opened,
    page_fixture,
    site_fixture,
)
from playwright.sync_api import expect


def test_a_refused_field_is_marked_and_explained_at_its_column(page: Page):
    page.fake.refusal = error(
        400, "cot.temperature: must be at most 100, got 500", "cot.temperature"
    )
    page.fake.refused_modes = ("soft",)
    page.part(1, "settings").locator("summary").click()
    bad = page.column(1).locator("[data-field='cot.temperature']")
    bad.fill("500")
    page.run()
    expect(page.part(1, "errorTitle")).to_have_text("The server refused cot.temperature")
    expect(page.part(1, "errorDetail")).to_contain_text("must be at most 100")
    expect(page.part(1, "errorRemedy")).to_contain_text("marked field")
    expect(bad).to_have_attribute("aria-invalid", "true")
    expect(bad).to_be_focused()
    expect(page.part(0, "phase")).to_have_text("done")
    expect(page.part(0, "error")).to_be_hidden()
    page.fake.refusal = None
    bad.fill("50")
    expect(bad).not_to_have_attribute("aria-invalid", "true")
    page.run()
    expect(page.part(1, "error")).to_be_hidden()


def test_a_refused_shared_field_is_marked_above(page: Page):
    page.fake.refusal = error(
        400, "cot.max_think_tokens: 192 think + 2 forced tokens leave no room", None
    )
    page.run()
    shared = page.page.locator("#shared-fields [data-field='cot.max_think_tokens']")
    expect(shared).to_have_attribute("aria-invalid", "true")
    expect(page.part(0, "errorTitle")).to_have_text("The server refused cot.max_think_tokens")


def test_what_is_no_number_is_not_even_sent(page: Page):
    page.page.locator("[data-field=max_tokens]").fill("many")
    page.run()
    assert page.fake.requests == []
    expect(page.page.locator("[data-field=max_tokens]")).to_have_attribute("aria-invalid", "true")
    expect(page.part(0, "errorDetail")).to_have_text("Enter a whole number.")


def test_an_empty_question_is_not_sent(page: Page):
    page.page.locator("#prompt").fill("  ")
    page.run()
    assert page.fake.requests == []
    expect(page.page.locator("#prompt-error")).to_have_text("Enter a question.")
    expect(page.page.locator("#prompt")).to_be_focused()


def test_a_failing_server_is_reported_with_its_words(page: Page):
    page.fake.refusal = error(500, "the model produced NaN logits", None)
    page.run()
    expect(page.part(0, "errorTitle")).to_have_text("The server failed (status 500)")
    expect(page.part(0, "errorDetail")).to_have_text("the model produced NaN logits")


def test_an_error_inside_the_stream_keeps_what_came_before(page: Page):
    async def script(fake: Fake, body: dict[str, Any]):
        async for chunk in chain(fake, body):
            if "cot" not in chunk["choices"][0]:
                yield error(500, "engine died", None)[1]
                return
            yield chunk

    page.fake.script = script
    page.run()
    expect(page.part(1, "errorDetail")).to_have_text("engine died")
    expect(page.part(1, "count")).to_have_text("24 steps")


def test_a_stream_without_an_end_is_called_cut_off(page: Page):
    async def script(fake: Fake, body: dict[str, Any]):
        yield choice({"reasoning": "a"})
        yield {"hang_up": True}

    page.fake.script = script
    page.run()
    expect(page.part(0, "errorTitle")).to_have_text("The answer was cut off")


def test_a_server_that_is_gone_is_told_from_one_that_refuses(chromium: Any):
    fake = Fake()
    with Running(make_app(fake)) as url:
        opening = opened(chromium, fake, url)
        page = next(opening)
    page.run()
    expect(page.part(0, "errorTitle")).to_have_text("The server does not answer")
    expect(page.part(0, "errorRemedy")).to_contain_text("softvllm serve")
    next(opening, None)


def test_a_key_is_asked_for_kept_in_the_tab_and_never_shared(page: Page):
    page.fake.key = "s3cret"
    page.page.reload()
    expect(page.page.locator("#server")).to_contain_text("wants an API key")
    expect(page.page.locator("#key")).to_have_attribute("aria-invalid", "true")
    page.run()
    expect(page.part(0, "errorTitle")).to_have_text("The server wants an API key")
    page.page.locator("#key").fill("s3cret")
    page.page.keyboard.press("Enter")
    expect(page.page.locator("#server")).to_have_text("softvllm 0.1.0 · vLLM 0.32.0")
    page.run()
    expect(page.part(0, "phase")).to_have_text("done")
    assert page.fake.keys[-1] == "Bearer s3cret"
    stored = page.page.evaluate("[Object.values(sessionStorage), Object.keys(localStorage)]")
    assert stored == [["s3cret"], []]
    page.page.locator("#share").click()
    links = page.page.evaluate(
        "atob(location.hash.slice(3).replaceAll('-', '+').replaceAll('_', '/'))"
    )
    assert "s3cret" not in links


def test_a_server_without_info_still_works(page: Page):
    page.fake.info = None
    page.page.reload()
    expect(page.page.locator("#server")).to_contain_text("no /v1/cot/info")
    page.run()
    expect(page.part(1, "phase")).to_have_text("done")


@pytest.mark.parametrize(
    "told", [{}, {"modes": [], "refusal": "needs --enforce-x"}, {"policies": None}]
)
def test_missing_pieces_of_the_info_are_filled_in(page: Page, told: dict[str, Any]):
    page.fake.info = told
    page.page.reload()
    expect(page.page.locator("#server")).to_have_text(told.get("refusal", "connected"))
    page.part(1, "mode").select_option("mixed")
    page.run()
    assert page.fake.requests[-1]["cot"].get("policy") == "blend"


def test_the_servers_defaults_are_the_placeholders(page: Page):
    page.fake.info = {**INFO, "recipe": {"end_strings": ["</think>"], "noise_scale": 0.2}}
    page.page.reload()
    placeholder = page.page.locator("[data-field='cot.end_strings']").get_attribute
    expect(page.part(1, "summary")).to_contain_text("noise 0.2")
    assert placeholder("placeholder") == "</think>"
    soft = page.column(1).locator("[data-field='cot.temperature']")
    assert soft.get_attribute("placeholder") == "0.5"
